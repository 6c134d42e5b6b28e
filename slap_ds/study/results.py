"""Results of a study: one row a cell, as Parquet, and as CSV for reading.

Columns: what tells the cell apart, every setting that differs between cells (`config.KEY`),
evaluation losses in nats per response token, counts, FLOPs, seconds, versions.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slap_ds.config.schema import Config
from slap_ds.study.plan import Cell
from slap_ds.study.records import Records

logger = logging.getLogger(__name__)

KEYS_FILE = "keys.json"
PLACES = ("run_dir", "data.train", "data.eval", "data.cache_dir", "model.path", "model.tokenizer")


def collect(folder: Path, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each finished cell, in the order of `cells`; cells that an earlier state of the
    study has made are left out, with a warning."""
    records = Records(folder)
    found = {cell: record for cell in cells if (record := records.read(cell)) is not None}
    path = folder / KEYS_FILE
    known = json.loads(path.read_text("utf-8")) if path.is_file() else None
    done = {
        cell: record
        for cell, record in found.items()
        if known is None or known.get(cell.name) == record["key"]
    }
    if stale := [cell.name for cell in found if cell not in done]:
        logger.warning(
            "left out %d cells of an earlier config, data or base model, run the study again: %s",
            len(stale),
            ", ".join(stale),
        )
    settings = {
        cell: dict(_flat(Config.model_validate(record["config"]).model_dump(mode="json")))
        for cell, record in done.items()
    }
    differing = [
        key
        for key in dict.fromkeys(key for each in settings.values() for key in each)
        if key not in PLACES and len({repr(each.get(key)) for each in settings.values()}) > 1
    ]
    rows = []
    for cell, record in done.items():
        config = settings[cell]
        row = {"cell": cell.name, **asdict(cell), **record["measured"]}
        row.update(_answers(record["answers"]))
        row.update({f"config.{key}": _text(config.get(key)) for key in differing})
        rows.append({**row, **record["environment"]})
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in keys} for row in rows]


def _answers(found: Mapping[str, Any] | None) -> dict[str, float]:
    """The metrics of answers, one column each: `answers.GROUP.METRIC`."""
    if found is None:
        return {}
    flat = _flat({key: value for key, value in found.items() if key != "settings"}, "answers.")
    return {key: float(value) for key, value in flat if isinstance(value, int | float)}


def write_rows(
    rows: Sequence[Mapping[str, Any]], path: Path, kinds: Sequence[str] = ("parquet", "csv")
) -> None:
    """`path` with the suffixes .parquet and .csv; floats in the CSV with six digits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if "parquet" in kinds:
        table = pa.Table.from_pylist([dict(row) for row in rows])
        pq.write_table(table, path.with_suffix(".parquet"))
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file, as dictionaries."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str | None:
    # One Parquet column has one type.
    return None if value is None else json.dumps(value)
