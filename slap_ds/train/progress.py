"""A progress bar on a terminal, a line now and then everywhere else (logs, CI)."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich import progress as bars
from rich.console import Console

_LINES = 10  # of a whole run, where there is no terminal


class Progress:
    """Shows steps, loss and throughput; `visible` is False on all ranks but one."""

    def __init__(self, steps: int, start_step: int, *, visible: bool) -> None:
        self.steps, self.done, self.visible = steps, start_step, visible
        self.console = Console(stderr=True, markup=False)
        self.started = time.perf_counter()
        self.picked = 0
        self._bar: bars.Progress | None = None
        if visible and self.console.is_terminal:
            self._bar = bars.Progress(
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TimeElapsedColumn(),
                bars.TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=steps, completed=start_step)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, record: dict[str, Any]) -> None:
        """Show a finished step's metrics record."""
        self.done += 1
        self.picked += record["picked"]
        text = f"loss {record['loss']:.3f}, trains {record['picked']} of {record['candidates']}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=text)
        elif self.visible and self.done % max(1, self.steps // _LINES) == 0:
            rate = self.picked / (time.perf_counter() - self.started)
            self.note(f"step {self.done}/{self.steps}: {text}, {rate:.1f} samples/s")

    def note(self, text: str) -> None:
        """Print a line, on the rank that shows progress."""
        if self.visible:
            self.console.print(text, highlight=False, markup=False)
