"""JSON as the standard has it (no repeated keys, NaN or Infinity, bounded nesting); JSON Lines.

A resumed run drops the lines of steps it is going to repeat, so a file never holds a step twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from slap_ds.files import write_text


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, not UTF-8, a repeated key, NaN or Infinity, or nested too deep.
    """
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deep") from None


def dumps(value: Any) -> str:
    """Compact, keys sorted, so that equal values give equal text.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated in one object")
    return found


class JsonLines:
    """An append-only file of records that each carry a `step`."""

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        if path.exists():
            _keep_before(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record; it is in the file when this returns, NaN and Inf as null."""
        # A loss that is NaN is no JSON; readers get null.
        known = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._file.write(json.dumps(known, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole record; a line cut short by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _keep_before(path: Path, start_step: int) -> None:
    kept = [record for record in read_lines(path) if record["step"] < start_step]
    rows = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
    write_text(path, "".join(rows))
