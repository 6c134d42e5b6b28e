"""Seconds per phase of a step, on the clock or between events of a GPU's stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def start_peak(device: torch.device) -> None:
    """From here on `peak_gib` counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Most memory of a GPU that tensors have held since `start_peak`; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30


@contextmanager
def phase_range(phase: str, cuda: bool) -> Iterator[None]:
    """A range of this name in torch's traces and, on a GPU, in NVTX's; costs microseconds."""
    if cuda:
        torch.cuda.nvtx.range_push(phase)
    try:
        with torch.profiler.record_function(f"slap_ds: {phase}"):
            yield
    finally:
        if cuda:
            torch.cuda.nvtx.range_pop()


class Stopwatch:
    """Seconds per phase: `with watch("score"): ...`, then `watch.seconds()["score_s"]`.

    On a GPU the time between two events of its stream counts, so that nothing has to wait for the
    device inside the step; `seconds` waits once, at the end.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._start = self._now()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        try:
            with phase_range(phase, self._cuda):
                yield
        finally:
            self._spans.append((f"{phase}_s", start, self._now()))

    def stop(self, phase: str) -> None:
        """What has passed since the watch was made counts as `phase`."""
        self._spans.append((f"{phase}_s", self._start, self._now()))

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
