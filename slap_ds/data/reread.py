"""The rows behind a store's samples, read again from the sources.

A store keeps tokens, not rows. This walks the sources as the store's builder did and pairs every
stored sample with the row it was made of.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from slap_ds.data.encoding import encode_talks
from slap_ds.data.formats import Conversation, conversation_of
from slap_ds.data.rows import read_rows
from slap_ds.data.samples import Rules
from slap_ds.data.sources import Source, find_sources
from slap_ds.data.store import TokenStore

BATCH_ROWS = 256


class Origin(NamedTuple):
    """A sample of the store together with the row it was made of."""

    position: int  # of the sample, in the store
    row: Mapping[str, Any]  # as read, all its fields
    conversation: Conversation


def reread(store: TokenStore, paths: Sequence[str], rules: Rules) -> Iterator[Origin]:
    """Every sample of the store with its row, in the store's order.

    Args:
        rules: those that the store was made by.

    Raises:
        ValueError: the sources do not give the store's samples any more.
    """
    index = 0
    rows = _usable(find_sources(paths), rules)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        encoded = encode_talks(rules.template, [conversation for *_, conversation in batch])
        for (where, number, row, conversation), result in zip(batch, encoded, strict=True):
            sample = rules.sample(result)
            if sample is None:
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
    store: TokenStore, wanted: Collection[int], paths: Sequence[str], rules: Rules
) -> dict[int, Conversation]:
    """Position -> conversation of a few samples; other rows are not tokenised.

    Raises:
        ValueError: the sources do not give these samples any more.
    """
    sources = find_sources(paths)
    places = {(int(store.file[i]), int(store.line[i])): i for i in wanted}
    near = [
        (places[file, number], conversation)
        for file in sorted({file for file, _ in places})
        for _, number, _, conversation in _usable(sources[file : file + 1], rules)
        if (file, number) in places
    ]
    found = {}
    encoded = encode_talks(rules.template, [conversation for _, conversation in near])
    for (i, conversation), result in zip(near, encoded, strict=True):
        sample = rules.sample(result)
        if sample is not None and sample.content == store.content[i]:
            found[i] = conversation
    if len(found) != len(places):
        raise ValueError("the files in data.train have changed since the run")
    return found


def _usable(
    sources: Sequence[Source], rules: Rules
) -> Iterator[tuple[str, int, Mapping[str, Any], Conversation]]:
    for source in sources:
        for number, row in read_rows(source, rules.limits):
            try:
                if isinstance(row, ValueError):
                    continue
                found = conversation_of(row, rules.format, rules.limits)
                yield source.name, number, row, found
            except ValueError:  # the store's builder wrote it to rejects.jsonl
                continue
