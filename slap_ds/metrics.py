"""metrics.jsonl and picks.jsonl: one JSON object a line, units in the keys, rank 0 writes.

A resumed run drops the lines of steps it is going to repeat, so a file never holds a step twice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


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


def loss_spread(loss: Tensor, picks: Tensor) -> dict[str, list[float]]:
    """What losses a step's picks have among its candidates, in a few numbers.

    `loss` (N,) nats per token, NaN or infinite ones left out; `picks` (M,) positions. Returns the
    minimum, nine deciles and the maximum of candidates and of picks, and the share kept of each
    tenth of the candidates by rank of loss, smallest first (fewer parts below ten candidates).
    """
    values = loss.double().cpu().numpy()
    kept = np.zeros(len(values), dtype=bool)
    kept[picks.cpu().numpy()] = True
    finite = np.isfinite(values)
    values, kept = values[finite], kept[finite]
    if not kept.any():
        return {}
    tenths = np.linspace(0, 1, 11)
    parts = np.array_split(np.argsort(values, kind="stable"), min(10, len(values)))
    return {
        "candidate_loss_deciles": np.quantile(values, tenths).tolist(),
        "picked_loss_deciles": np.quantile(values[kept], tenths).tolist(),
        "kept_by_loss_decile": [float(kept[part].mean()) for part in parts],
    }


def _keep_before(path: Path, start_step: int) -> None:
    kept = [record for record in read_lines(path) if record["step"] < start_step]
    temporary = path.with_suffix(".tmp")
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class Stopwatch:
    """Seconds per phase: `with watch("score"): ...`, then `watch.seconds()["score_s"]`.

    On a GPU the time between two events of its stream counts, so that nothing has to wait for the
    device inside the step; `seconds` waits once, at the end.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self._spans.append((f"{phase}_s", start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far, repeated phases added up."""
        out: dict[str, float] = {}
        if self._cuda:
            torch.cuda.synchronize()
        for key, start, end in self._spans:
            took = start.elapsed_time(end) / 1000 if self._cuda else end - start
            out[key] = out.get(key, 0.0) + took
        return out

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
