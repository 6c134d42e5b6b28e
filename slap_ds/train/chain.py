"""The chain through picks.jsonl: each line has a hash of itself and of the line before.

A line that is changed, added or taken out later breaks it there; the last hash, kept elsewhere,
stands for the whole file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from slap_ds import jsonl

KEY = "chain"


def chained(before: str, record: Mapping[str, Any]) -> str:
    """The hash of `record`, less its own, and of the one `before`: SHA-256 in hex. Before the first
    line stands the fingerprint of the training data."""
    rest = {key: value for key, value in record.items() if key != KEY}
    return hashlib.sha256(f"{before}\n{jsonl.dumps(rest)}".encode()).hexdigest()


def last_link(records: Sequence[Mapping[str, Any]], fingerprint: str) -> str:
    """What the next line follows."""
    return str(records[-1].get(KEY, fingerprint)) if records else fingerprint


def broken_link(records: Sequence[Mapping[str, Any]], fingerprint: str) -> int | None:
    """The first record that does not follow from those before it; None: all do.

    Those of a version without a chain may come first.
    """
    before = None
    for number, record in enumerate(records):
        if KEY not in record and before is None:
            continue
        before = before or fingerprint
        if record.get(KEY) != chained(before, record):
            return number
        before = record[KEY]
    return None
