"""A store is made in parts, each from a chunk of rows, in any process.

    sources -> read_chunks -> Chunk, Chunk, ... -> encode -> Part: bytes for the end of every file

The parts of a store, laid end to end in the chunks' order, are the store, however it was cut into
chunks and whoever encoded them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from slap_ds.data.counts import Counts
from slap_ds.data.encoding import Encoded, encode_talks
from slap_ds.data.formats import Conversation, Reject, used
from slap_ds.data.guard import Place
from slap_ds.data.rows import Raw, Table, parsed, read_raw
from slap_ds.data.samples import Cut, Rules, cut
from slap_ds.data.sources import Limits, Source
from slap_ds.data.store import COLUMNS, LABELS, ORIGIN

CHUNK_ROWS = 512
CHUNK_BYTES = 1_000_000  # of JSON lines
BATCH_CHARACTERS = 1_000_000  # tokenised at once

Chunk = list[tuple[int, int, Raw]]  # number of the source, number of its row, what stands there
Located = tuple[int, int, Conversation | Reject]  # number of the source, of its row, the row


@dataclass(frozen=True)
class Part:
    """What a chunk adds to a store. In `files`, columns of labels hold places in `names`."""

    counts: Counts
    names: dict[str, list[str]]  # of each label those met, in the order of their first samples
    files: dict[str, bytes]

    def pack(self) -> bytes:
        """The part in one piece, for another process."""
        sizes = {name: len(data) for name, data in self.files.items()}
        head = json.dumps([asdict(self.counts), self.names, sizes]).encode()
        return b"".join([len(head).to_bytes(8, "little"), head, *self.files.values()])

    @classmethod
    def unpack(cls, data: bytes) -> Part:
        """What `pack` gave."""
        place = 8 + int.from_bytes(data[:8], "little")
        counts, names, sizes = json.loads(data[8:place])
        files = {}
        for name, size in sizes.items():
            files[name] = data[place : place + size]
            place += size
        return cls(Counts(**counts), names, files)


def read_chunks(
    sources: Sequence[Source], limits: Limits, skip: int, place: Place
) -> Iterator[Chunk]:
    """The rows of the sources behind the first `skip`, in order, in chunks that bound memory."""
    chunk: Chunk = []
    rows = size = 0
    for index, source in enumerate(sources):
        place.set(f"{source.name}, line 1")
        for number, raw in read_raw(source, limits):
            held = len(raw) if isinstance(raw, Table) else 1
            place.set(f"{source.name}, line {number + held}")
            passed = min(skip, held)
            skip -= passed
            if passed == held:
                continue
            if passed and isinstance(raw, Table):
                raw = Table(raw.rows.slice(passed))
            chunk.append((index, number + passed, raw))
            rows += held - passed
            size += len(raw) if isinstance(raw, bytes) else 0
            if rows >= CHUNK_ROWS or size > CHUNK_BYTES:
                yield chunk
                chunk, rows, size = [], 0, 0
                place.set(f"{source.name}, line {number + held}")
    if chunk:
        yield chunk


def encode(chunk: Chunk, sources: Sequence[Source], rules: Rules, place: Place) -> Part:
    """Parse, check and tokenise the rows of a chunk."""
    made = _Made(rules)
    for batch in _batches(_rows(chunk, sources, rules, place)):
        (first, begin, _), (last, end, _) = batch[0], batch[-1]
        place.set(
            f"{sources[first].name}, line {begin}, to {sources[last].name}, line {end},"
            " being tokenised"
        )
        talks = [row for _, _, row in batch if isinstance(row, Conversation)]
        encoded = iter(encode_talks(rules.template, talks))
        for index, line, row in batch:
            made.counts.rows += 1
            result = next(encoded) if isinstance(row, Conversation) else row
            if isinstance(result, ValueError):
                result = Reject(sources[index].name, line, str(result))
            if isinstance(row, Conversation) and isinstance(result, Encoded):
                made.add(row, result, index, line)
            else:
                made.rejects.append(json.dumps(asdict(result), ensure_ascii=False) + "\n")
    return made.part()


class _Made:
    """What has been made of a chunk so far."""

    def __init__(self, rules: Rules) -> None:
        self.counts = Counts()
        self.rejects: list[str] = []
        self._rules = rules
        self._samples: list[Cut] = []
        self._names: dict[str, dict[str, int]] = {label: {} for label in LABELS}
        self._columns: dict[str, list[int]] = {name: [] for name in (*LABELS, *ORIGIN)}

    def add(self, row: Conversation, encoded: Encoded, index: int, line: int) -> None:
        """A row that could be encoded, and where it stands."""
        sample = cut(encoded, self._rules.max_tokens, self._rules.over_length)
        if sample == "too long":
            self.counts.dropped_too_long += 1
            return
        if isinstance(sample, str):
            self.counts.dropped_no_trained_tokens += 1
            return
        self._samples.append(sample)
        for label, codes in self._names.items():
            self._columns[label].append(codes.setdefault(getattr(row, label), len(codes)))
        self._columns["file"].append(index)
        self._columns["line"].append(line)
        self.counts.with_media += row.media
        self.counts.context_turns += encoded.context_turns
        self.counts.truncated += len(encoded.ids) > self._rules.max_tokens
        self.counts.tokens += len(sample.ids)
        self.counts.trained_tokens += sample.trained

    def part(self) -> Part:
        samples, counts = self._samples, self.counts
        counts.rejected = len(self.rejects)
        tokens = np.concatenate([np.empty(0, "<u4"), *(sample.ids for sample in samples)])
        files = {
            "tokens.bin": tokens.astype(self._rules.token_type).tobytes(),
            "mask.bin": b"".join(sample.mask for sample in samples),
            "rejects.jsonl": "".join(self.rejects).encode("utf-8", "backslashreplace"),
        }
        columns = {
            "lengths": [len(sample.ids) for sample in samples],
            "trained_tokens": [sample.trained for sample in samples],
            "content": [sample.content for sample in samples],
            **self._columns,
        }
        for name, kind in {**COLUMNS, **ORIGIN}.items():
            files[f"{name}.bin"] = np.array(columns[name], dtype=kind).tobytes()
        return Part(counts, {label: list(codes) for label, codes in self._names.items()}, files)


def _rows(chunk: Chunk, sources: Sequence[Source], rules: Rules, place: Place) -> Iterator[Located]:
    for index, first, raw in chunk:
        source = sources[index]
        place.set(f"{source.name}, line {first}")
        for number, row in parsed(first, raw, rules.limits):
            if number != first:
                place.set(f"{source.name}, line {number}")
            yield index, number, used(source, number, row, rules.format, rules.limits)


def _batches(rows: Iterator[Located]) -> Iterator[list[Located]]:
    """Bounded by characters, so that memory does not grow with the data."""
    batch: list[Located] = []
    characters = 0
    for located in rows:
        batch.append(located)
        if isinstance(located[2], Conversation):
            characters += located[2].size
        if characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
