"""The rows behind a store's samples, read again from the sources.

A store keeps tokens, not rows. This walks the sources as the store's builder did and pairs every
stored sample with the row it was made of.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from slap_ds.data.encoding import Template, encode_talks
from slap_ds.data.formats import Conversation, conversation_of
from slap_ds.data.sources import Limits, Source, find_sources, read_rows
from slap_ds.data.store import TokenStore, cut

BATCH_ROWS = 256


class Origin(NamedTuple):
    """A sample of the store together with the row it was made of."""

    position: int  # of the sample, in the store
    row: Mapping[str, Any]  # as read, all its fields
    conversation: Conversation


def reread(
    store: TokenStore,
    paths: Sequence[str],
    *,
    format: str,
    template: Template,
    max_tokens: int,
    over_length: Literal["truncate", "drop"],
    limits: Limits,
) -> Iterator[Origin]:
    """Every sample of the store with its row, in the store's order.

    The arguments are those that `build_store` made the store with.

    Raises:
        ValueError: the sources do not give the store's samples any more.
    """
    index = 0
    rows = _usable(find_sources(paths), format, limits)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        encoded = encode_talks(template, [conversation for *_, conversation in batch])
        for (where, number, row, conversation), result in zip(batch, encoded, strict=True):
            if isinstance(result, ValueError):
                continue
            sample = cut(result, max_tokens, over_length)
            if isinstance(sample, str):
                continue
            if index >= len(store) or sample.content != store.content[index]:
                raise ValueError(
                    f"{where}, row {number}, is not what was read before: the data have changed, "
                    "run this again"
                )
            yield Origin(index, row, conversation)
            index += 1
    if index != len(store):
        raise ValueError(
            f"the data gave {len(store)} samples before and {index} now: they have changed, run "
            "this again"
        )


def reread_few(
    store: TokenStore,
    wanted: Collection[int],
    paths: Sequence[str],
    *,
    format: str,
    template: Template,
    max_tokens: int,
    over_length: Literal["truncate", "drop"],
    limits: Limits,
) -> dict[int, Conversation]:
    """Position -> conversation of a few samples; what lies far from them is not tokenised.

    Raises:
        ValueError: the sources do not give these samples any more.
    """
    with (store.folder / "rejects.jsonl").open(encoding="utf-8") as file:
        rejected = {(row["file"], row["line"]) for row in map(json.loads, file)}
    usable = (
        conversation
        for name, number, _, conversation in _usable(find_sources(paths), format, limits)
        if (name, number) not in rejected
    )
    # Rows dropped for their length moved those after them forward, nobody knows which.
    dropped = store.counts.dropped_too_long + store.counts.dropped_no_trained_tokens
    places = sorted(wanted)
    near = (
        conversation
        for row, conversation in enumerate(usable)
        if (i := bisect_left(places, row - dropped)) < len(places) and places[i] <= row
    )
    by_content: dict[int, Conversation] = {}
    while batch := list(itertools.islice(near, BATCH_ROWS)):
        for conversation, result in zip(batch, encode_talks(template, batch), strict=True):
            if not isinstance(result, ValueError):
                sample = cut(result, max_tokens, over_length)
                if not isinstance(sample, str):
                    by_content[sample.content] = conversation
    found = {i: by_content.get(int(store.content[i])) for i in places}
    if None in found.values():
        raise ValueError("the files in data.train have changed since the run")
    return {i: conversation for i, conversation in found.items() if conversation is not None}


def _usable(
    sources: Sequence[Source], format: str, limits: Limits
) -> Iterator[tuple[str, int, Mapping[str, Any], Conversation]]:
    for source in sources:
        for number, row in read_rows(source, limits):
            try:
                if isinstance(row, ValueError):
                    continue
                found = conversation_of(row, format, limits)
                yield source.name, number, row, found
            except ValueError:  # the store's builder wrote it to rejects.jsonl
                continue
