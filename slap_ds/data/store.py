"""From files to a memory-mapped store of tokens, built once.

    rows -> template -> cut to length -> token file, mask file, one array a column -> TokenStore

The store lies in a cache folder named after all that decides its content: the bytes of the data
files, the format, the template with its tokenizer, and the length rule. It is built in a temporary
folder and renamed, so a folder with that name is always whole, whoever else builds or dies.

Over-long samples: `truncate` cuts the end off at `max_tokens`, and a sample that loses all its
trained tokens by that is dropped; `drop` leaves over-long samples out. Both are counted.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import secrets
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from slap_ds.data.counts import Counts, say_aloud
from slap_ds.data.encoding import Encoded, Template, encode_talks
from slap_ds.data.formats import Conversation, Reject, read_sources
from slap_ds.data.guard import Place, guarded
from slap_ds.data.sources import Limits, Source, find_sources, source_facts
from slap_ds.files import sha256

logger = logging.getLogger(__name__)

STORE_VERSION = 4
POSITION_BITS = 28
BATCH_ROWS = 512
BATCH_CHARACTERS = 1_000_000
LABELS = ("task", "source", "lang")
COLUMNS = {
    "lengths": "<i8",
    "trained_tokens": "<i8",
    "content": "<i8",
    "task": "<i4",
    "source": "<i4",
    "lang": "<i4",
}
# Where each sample came from; not part of the fingerprint, for files may be moved.
ORIGIN = {"file": "<i4", "line": "<i8"}

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sample:
    """One stored sample; ids are a copy (the file may hold 16 bits a token), mask is a view."""

    ids: Int32  # (len,) token ids
    mask: npt.NDArray[np.bool_]  # (len,) True where the token is trained


class TokenStore:
    """n tokenised samples, memory-mapped and read-only. Made by `build_store`.

    Attributes:
        folder: where it lies.
        fingerprint: sha256 (hex) of the stored tokens, masks and labels.
        lengths, trained_tokens: (n,) int64, tokens of each sample and those predicted with loss.
        content: (n,) int64 >= 0, 63-bit hash of ids and mask: equal where samples are equal.
        sample_ids: (n,) int64 >= 0, 35 bits of `content` << 28 | position in the store.
        task, source, lang: (n,) int32 codes into `names["task"]`, ...
        file, line: (n,) int32 number of the source, in their order from 0, and int64 number of the
            row in it, as rejects.jsonl counts them: what a sample was made of.
        counts: what became of the rows.

    Raises ValueError where the folder holds no whole store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
            sizes: dict[str, int] = manifest["sizes"]
            for name, size in sizes.items():
                found = (folder / name).stat().st_size
                if found != size:
                    raise ValueError(f"{name} has {found} bytes, the manifest says {size}")
            self.fingerprint: str = manifest["fingerprint"]
            self.names: dict[str, list[str]] = manifest["names"]
            self.counts = Counts(**manifest["counts"])
            self._ids = _map(folder / "tokens.bin", manifest["token_type"])
            self._mask = _map(folder / "mask.bin", "?")
            kinds = {**COLUMNS, **ORIGIN}
            columns = {name: _map(folder / f"{name}.bin", kind) for name, kind in kinds.items()}
            if not columns["lengths"].sum() == len(self._ids) == len(self._mask):
                raise ValueError("the lengths do not add up to the tokens stored")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder}: no whole token store: {error}") from error
        self.lengths: Int64 = columns["lengths"]
        self.trained_tokens: Int64 = columns["trained_tokens"]
        self.content: Int64 = columns["content"]
        self.task: Int32 = columns["task"]
        self.source: Int32 = columns["source"]
        self.lang: Int32 = columns["lang"]
        self.file: Int32 = columns["file"]
        self.line: Int64 = columns["line"]
        positions = np.arange(len(self.lengths), dtype=np.int64)
        self.sample_ids: Int64 = (self.content >> POSITION_BITS << POSITION_BITS) | positions
        self._ends: Int64 = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a store of {len(self)}")
        end = int(self._ends[index])
        span = slice(end - int(self.lengths[index]), end)
        return Sample(self._ids[span].astype(np.int32), self._mask[span])


def _map(path: Path, kind: str) -> Any:
    if path.stat().st_size == 0:  # which mmap refuses
        return np.empty(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")


def build_store(
    paths: Sequence[str],
    *,
    format: str,
    template: Template,
    max_tokens: int,
    over_length: Literal["truncate", "drop"],
    cache_dir: Path,
    max_reject_share: float = 0.1,
    rejects_path: Path | None = None,
    progress: Callable[[int], None] | None = None,
    limits: Limits | None = None,
) -> TokenStore:
    """The store of these data, from the cache or newly built.

    Rows that cannot be used are written to `rejects.jsonl` (file, line, reason) in the store's
    folder, and copied to `rejects_path`. `progress` is called with the number of rows read so far.

    Raises FileNotFoundError (nothing at a path) and ValueError: bad arguments, unreadable file, no
    rows, more than `max_reject_share` of the rows rejected, or no supervised token left.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}: expected 2 or more, a prompt and an answer")
    if over_length not in ("truncate", "drop"):
        raise ValueError(f"over_length is {over_length!r}: expected truncate or drop")
    sources = find_sources(paths)
    limits = limits or Limits()
    key = _key(sources, format, template, max_tokens, over_length, limits)
    folder = Path(cache_dir) / key
    store = _open(folder)
    if store is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".building-{key[:8]}-{os.getpid()}-{secrets.token_hex(4)}")
        temporary.mkdir()
        try:

            def build(place: Place, report: Callable[[int], None]) -> None:
                def note(file: str, line: int) -> None:
                    place.set(f"{file}, line {line}")

                rows = read_sources(sources, format, limits, note)
                numbers = {id(source): number for number, source in enumerate(sources)}
                _write(temporary, rows, numbers, template, max_tokens, over_length, report, place)

            try:
                guarded(build, progress)
            except OSError as error:  # a full disk does not say which
                if error.errno is None or error.filename is not None:
                    raise
                raise OSError(error.errno, error.strerror, str(folder.parent)) from None
            store = _publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if rejects_path is not None:
        rejects_path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "rejects.jsonl", rejects_path)
    _check(store, paths, max_tokens, max_reject_share)
    say_aloud(store.counts, template.notes)
    return store


def _key(
    sources: Sequence[Source],
    format: str,
    template: Template,
    max_tokens: int,
    over_length: str,
    limits: Limits,
) -> str:
    """Name of the cache folder: a hash of all that decides the store's content."""
    rules = [max_tokens, over_length, asdict(limits)]
    parts = [STORE_VERSION, source_facts(sources), format, template.fingerprint(), *rules]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _open(folder: Path) -> TokenStore | None:
    if not folder.exists():
        return None
    try:
        return TokenStore(folder)
    except ValueError as error:
        logger.warning("the cached data are damaged and will be rebuilt: %s", error)
        return None


def _publish(temporary: Path, folder: Path) -> TokenStore:
    """Give the finished store its name, unless another process was faster."""
    while True:
        try:
            os.rename(temporary, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            _sync(folder.parent)
        try:
            return TokenStore(folder)
        except ValueError:
            # A damaged one holds the name. Taking it away before the new one was ready would have
            # left other processes with nothing.
            aside = temporary.with_name(f"{temporary.name}-damaged")
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that a power cut cannot leave an empty one behind."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class Cut:
    """An encoded conversation as it is stored."""

    ids: npt.NDArray[np.uint32]  # (len,) token ids
    mask: bytes  # one byte a token
    trained: int  # tokens predicted with loss
    content: int  # 63-bit hash of ids and mask


def cut(encoded: Encoded, max_tokens: int, over_length: str) -> Cut | str:
    """The sample under the length rule, or why there is none: "too long", "no trained tokens"."""
    if len(encoded.ids) > max_tokens and over_length == "drop":
        return "too long"
    ids = np.array(encoded.ids[:max_tokens], dtype="<u4")
    mask = bytes(encoded.mask[:max_tokens])
    trained = sum(mask[1:])  # nothing predicts the first token
    if trained == 0:
        return "no trained tokens"
    return Cut(ids, mask, trained, content_hash(ids, mask))


def content_hash(ids: npt.NDArray[np.integer], mask: bytes) -> int:
    """63 bits of (len,) token ids and their mask, one byte a token: equal for equal samples."""
    digest = hashlib.blake2b(ids.astype("<u4").tobytes() + mask, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


Located = tuple[Source, int, Conversation | Reject]


def _batches(rows: Iterator[Located]) -> Iterator[list[Located]]:
    """Bounded by rows and by characters, so that memory does not grow with the data."""
    batch: list[Located] = []
    characters = 0
    for source, line, row in rows:
        batch.append((source, line, row))
        if isinstance(row, Conversation):
            characters += row.size
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write(
    folder: Path,
    rows: Iterator[Located],
    numbers: Mapping[int, int],  # of each source, by its identity
    template: Template,
    max_tokens: int,
    over_length: str,
    progress: Callable[[int], None],
    place: Place,
) -> None:
    """Tokenise all rows into the files of a store."""
    token_type = "<u2" if template.vocab_size <= 2**16 else "<u4"
    counts = Counts()
    columns = {name: array("q") for name in (*COLUMNS, *ORIGIN)}
    names: dict[str, dict[str, int]] = {label: {} for label in LABELS}
    with (
        (folder / "tokens.bin").open("wb") as token_file,
        (folder / "mask.bin").open("wb") as mask_file,
        (folder / "rejects.jsonl").open(
            "w", encoding="utf-8", errors="backslashreplace"
        ) as rejects,
    ):
        for batch in _batches(rows):
            (source, line, _), (last, end, _) = batch[0], batch[-1]
            place.set(f"{source.name}, line {line}, to {last.name}, line {end}, being tokenised")
            talks = [row for _, _, row in batch if isinstance(row, Conversation)]
            encoded = iter(encode_talks(template, talks))
            for source, line, row in batch:
                counts.rows += 1
                result = next(encoded) if isinstance(row, Conversation) else row
                if isinstance(result, ValueError):
                    result = Reject(source.name, line, str(result))
                if isinstance(result, Reject):
                    counts.rejected += 1
                    rejects.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")
                    continue
                sample = cut(result, max_tokens, over_length)
                if sample == "too long":
                    counts.dropped_too_long += 1
                    continue
                if isinstance(sample, str):
                    counts.dropped_no_trained_tokens += 1
                    continue
                token_file.write(sample.ids.astype(token_type).tobytes())
                mask_file.write(sample.mask)
                columns["lengths"].append(len(sample.ids))
                columns["trained_tokens"].append(sample.trained)
                columns["content"].append(sample.content)
                for label in LABELS:
                    codes = names[label]
                    columns[label].append(codes.setdefault(getattr(row, label), len(codes)))
                columns["file"].append(numbers[id(source)])
                columns["line"].append(line)
                counts.with_media += isinstance(row, Conversation) and row.media
                counts.context_turns += result.context_turns
                counts.truncated += len(result.ids) > max_tokens
                counts.tokens += len(sample.ids)
                counts.trained_tokens += sample.trained
            progress(counts.rows)
    if len(columns["lengths"]) > 2**POSITION_BITS:
        raise ValueError(
            f"more than {2**POSITION_BITS:,} samples: sample ids have no room for them"
        )
    for name, kind in {**COLUMNS, **ORIGIN}.items():
        np.array(columns[name], dtype=kind).tofile(folder / f"{name}.bin")
    content = [sha256(folder / f"{name}.bin") for name in ("tokens", "mask", *COLUMNS)]
    named = {label: list(codes) for label, codes in names.items()}
    files = sorted(folder.iterdir())
    manifest = {
        "version": STORE_VERSION,
        "fingerprint": hashlib.sha256(json.dumps([content, named]).encode()).hexdigest(),
        "token_type": token_type,
        "counts": asdict(counts),
        "names": named,
        "sizes": {file.name: file.stat().st_size for file in files},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")
    for path in (*files, folder / "manifest.json", folder):
        _sync(path)


def _check(
    store: TokenStore, paths: Sequence[str], max_tokens: int, max_reject_share: float
) -> None:
    """Raise ValueError where there is nothing to train on, or too little of what there was."""
    counts = store.counts
    if counts.rows == 0:
        raise ValueError(f"the data set is empty: no rows in {', '.join(paths)}")
    with (store.folder / "rejects.jsonl").open(encoding="utf-8") as file:
        first = [json.loads(line) for line in itertools.islice(file, 3)]
    reasons = "; ".join(f"{r['file']}, line {r['line']}: {r['reason']}" for r in first)
    if counts.rejected > max_reject_share * counts.rows:
        raise ValueError(
            f"{counts.rejected} of {counts.rows} rows cannot be used, more than the share of"
            f" {max_reject_share:g} that may be rejected; the first: {reasons}"
        )
    if len(store) == 0:
        raise ValueError(
            f"no supervised tokens: of {counts.rows} rows {counts.dropped_too_long} are longer than"
            f" max_tokens = {max_tokens} and were dropped, {counts.dropped_no_trained_tokens} have"
            f" no answer within max_tokens, {counts.rejected} cannot be used"
            + (f"; the first: {reasons}" if reasons else "")
        )
