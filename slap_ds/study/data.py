"""The rows of a study: base, fine-tuning and evaluation parts, and the variants, as JSONL files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slap_ds.data.formats import Conversation, Message, Reject, read_sources
from slap_ds.data.hashes import source_facts
from slap_ds.data.sources import find_sources
from slap_ds.files import write_text
from slap_ds.study.plan import PLAIN, Study, Variant, data_file

Rows = list[Conversation]


def write_data(study: Study, folder: Path) -> dict[str, Any]:
    """Write the study's rows into `folder`/data, unless they are there already.

    base.jsonl and train-plain.jsonl share no row, eval.jsonl is the same for all cells, and
    train-NAME.jsonl are the variants of train-plain.jsonl. Returns what was made: `rows` by file
    and source, `rejected` rows, and a `hash` of all that decides them.

    Raises:
        ValueError, FileNotFoundError: no usable rows; a source that a variant names is missing.
    """
    assert study.data is not None
    spec = study.data
    note = folder / "data" / "data.json"
    train_sources, eval_sources = find_sources(spec.train), find_sources(spec.eval)
    base_sources = find_sources(spec.base) if spec.base else []
    facts = {
        "data": spec.model_dump(mode="json", exclude={"train", "eval", "base"}),
        "variants": {name: v.model_dump(mode="json") for name, v in study.variants.items()},
        "files": [source_facts(each) for each in (train_sources, eval_sources, base_sources)],
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if note.is_file():
        known: dict[str, Any] = json.loads(note.read_text("utf-8"))
        if known["hash"] == key:
            return known
    train, rejected = _read(train_sources)
    held_out, rejected_eval = _read(eval_sources)
    if not train or not held_out:
        raise ValueError(f"no usable rows in {spec.train if not train else spec.eval}")
    base, tune = split(train, spec.per_source, spec.base_share, spec.seed, spec.rows)
    if base_sources:
        own, rejected_base = _read(base_sources)
        rejected += rejected_base
        base = split(own, spec.base_per_source, 0.0, spec.seed)[1]
    files = {
        "base": base,
        f"train-{PLAIN}": tune,
        "eval": split(held_out, spec.eval_per_source, 0.0, spec.seed)[1],
    }
    for name, variant in study.variants.items():
        files[f"train-{name}"] = changed(tune, variant, spec.seed)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        _write(data_file(folder, name), rows)
    made = {
        "hash": key,
        "rejected": rejected + rejected_eval,
        "rows": {name: _count(rows) for name, rows in files.items()},
    }
    write_text(note, json.dumps(made, indent=1, ensure_ascii=False))
    return made


def split(
    rows: Iterable[Conversation],
    per_source: int | None,
    base_share: float,
    seed: int,
    of_source: Mapping[str, int] | None = None,
) -> tuple[Rows, Rows]:
    """At most `per_source` random rows of each source, in two disjoint parts, base first; of the
    sources that `of_source` names, at most so many.

    A source's draw depends on the seed, its name and its own rows, not on other sources.

    Raises:
        ValueError: `of_source` names a source that has no rows.
    """
    base, rest = [], []
    groups, limits = _by_source(rows), of_source or {}
    if missing := sorted(set(limits) - set(groups)):
        raise ValueError(
            f"data.rows: no source {', '.join(map(repr, missing))}; the sources are "
            f"{', '.join(sorted(groups))}"
        )
    for source, members in groups.items():
        limit = limits.get(source, per_source)
        order = _generator(seed, source).permutation(len(members))[:limit]
        cut = round(base_share * len(order))
        base += [members[i] for i in order[:cut]]
        rest += [members[i] for i in order[cut:]]
    return base, rest


def changed(rows: Rows, variant: Variant, seed: int) -> Rows:
    """The rows under a variant.

    Raises:
        ValueError: noise for a source with fewer than two rows to shuffle.
    """
    out = list(rows)
    if variant.noise is not None:
        named = variant.noise.source
        for source in [named] if named is not None else list(_by_source(out)):
            out = _noisy(out, source, variant.noise.share, seed)
    if variant.duplicates is not None:
        copies: Rows = []
        for source, members in _by_source(out).items():
            count = round(variant.duplicates.share * len(members))
            chosen = _generator(seed, f"{source} copies").permutation(len(members))[:count]
            copied = [_renamed(members[i], f"{source} (copies)") for i in sorted(chosen)]
            for time in range(1, variant.duplicates.times):
                generator = _generator(seed, f"{source} edits {time}")
                copies += [edited(row, variant.duplicates.edited, generator) for row in copied]
        out += copies
    return out


def _noisy(rows: Rows, source: str, share: float, seed: int) -> Rows:
    """All answers of a share of the source's rows, each moved to another place among them."""
    where = [i for i, row in enumerate(rows) if row.source == source]
    generator = _generator(seed, f"{source} noise")
    chosen = sorted(generator.permutation(where)[: round(share * len(where))].tolist())
    places = [
        (i, j) for i in chosen for j, m in enumerate(rows[i].messages) if m.role == "assistant"
    ]
    if len(places) < 2:
        raise ValueError(
            f"noise: source {source!r} has {len(places)} answers to shuffle, it takes two; the "
            f"sources are {', '.join(sorted({row.source for row in rows}))}"
        )
    # Each takes the answer of the next one in a random circle, so none keeps its own.
    circle = generator.permutation(len(places))
    answer = {
        places[a]: rows[places[b][0]].messages[places[b][1]].content
        for a, b in zip(circle, np.roll(circle, -1), strict=True)
    }
    out = list(rows)
    for i in chosen:
        messages = tuple(
            Message(m.role, answer.get((i, j), m.content)) for j, m in enumerate(rows[i].messages)
        )
        out[i] = Conversation(messages, rows[i].task, f"{source} (noise)", rows[i].lang)
    return out


def edited(row: Conversation, share: float, generator: np.random.Generator) -> Conversation:
    """The row with `share` of the units of each message dropped, doubled or swapped with the next,
    at least one of a message of three or more; share 0: as it is."""
    if not share:
        return row
    messages = tuple(Message(m.role, _edited(m.content, share, generator)) for m in row.messages)
    return Conversation(messages, row.task, row.source, row.lang)


def _edited(text: str, share: float, generator: np.random.Generator) -> str:
    # A unit keeps the space before it; a text of few spaces is taken character by character.
    units = re.findall(r"\s*\S+|\s+$", text)
    if len(units) * 12 < len(text):
        units = list(text)
    if len(units) < 3:
        return text
    count = max(1, round(share * len(units)))
    # From the end, so that the places still to come stay where they are.
    for place in sorted(generator.choice(len(units) - 1, count, replace=False), reverse=True):
        kind = generator.integers(3)
        if kind == 0:
            del units[place]
        elif kind == 1:
            units.insert(place, units[place])
        else:
            units[place], units[place + 1] = units[place + 1], units[place]
    return "".join(units)


def _renamed(row: Conversation, source: str) -> Conversation:
    return Conversation(row.messages, row.task, source, row.lang)


def _generator(seed: int, name: str) -> np.random.Generator:
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=[seed, word]))


def _by_source(rows: Iterable[Conversation]) -> dict[str, Rows]:
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(row.source, []).append(row)
    return groups


def _count(rows: Rows) -> dict[str, int]:
    return {source: len(members) for source, members in _by_source(rows).items()}


def _read(sources: Any) -> tuple[Rows, int]:
    rows, rejected = [], 0
    for row in read_sources(sources):
        if isinstance(row, Reject):
            rejected += 1
        else:
            rows.append(row)
    return rows, rejected


def _write(path: Path, rows: Rows) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            record = {
                "messages": [{"role": m.role, "content": m.content} for m in row.messages],
                "task": row.task,
                "source": row.source,
                "lang": row.lang,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
