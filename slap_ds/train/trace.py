"""Traces of chosen steps (`profile.steps`): what runs when, on the host and on the GPU."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from slap_ds.train.run import Run


class Trace:
    """`with Trace(run) as trace:` and `trace.at(step)` where each step begins; a file a rank.

    A run that ends inside the range leaves what there is.
    """

    def __init__(self, run: Run) -> None:
        self.steps = run.config.profile.steps
        self.file = run.run_dir / "profile" / f"rank-{run.comm.rank}.json"
        self._cuda = run.engine.device.type == "cuda"
        self._profiler: Any = None

    def __enter__(self) -> Trace:
        return self

    def at(self, step: int) -> None:
        """The step begins: the trace begins or ends with it, if it is one of `profile.steps`."""
        if self.steps is None:
            return
        first, last = self.steps
        if self._profiler is None and first <= step <= last and not self.file.exists():
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.__enter__()
        elif step > last:
            self.close()

    def close(self) -> None:
        """End the trace and write its file."""
        if self._profiler is None:
            return
        self._profiler.__exit__(None, None, None)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.file))
        self._profiler = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()
