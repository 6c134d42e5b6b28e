"""What a run leaves behind as it goes: its JSON Lines files, and a progress bar.

metrics.jsonl        steps, evaluations, checkpoints, changed settings
picks.jsonl          the sample ids trained at each step, their weights, their losses where they
                     were scored, and a hash of all that and of the line before (train/chain.py)
starts.jsonl         when, on what and with which versions the run was started, and what it read
quarantine.jsonl     samples that were left out, or blamed for a step that changed nothing
eval_samples.jsonl   with evaluation.keep_losses: every sample's loss
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

import torch
import transformers

from slap_ds import __version__
from slap_ds.config.outputs import ANSWERS
from slap_ds.jsonl import JsonLines, read_lines
from slap_ds.train.chain import KEY, chained, last_link
from slap_ds.train.progress import Progress
from slap_ds.train.record import StepRecord
from slap_ds.train.run import Run
from slap_ds.train.trackers import Trackers


class Journal:
    """Rank 0 writes, and tells the callbacks; on the others every method does nothing."""

    def __init__(
        self, run: Run, callbacks: Sequence[Callable[[Mapping[str, Any]], object]] = ()
    ) -> None:
        self.run, self.callbacks = run, callbacks
        self.writes = run.comm.rank == 0
        first = run.state.step
        self._began = time.monotonic()
        self.progress = Progress(len(run.stream), first, visible=self.writes)
        self._files: dict[str, JsonLines] = {}
        if self.writes:
            names = ["metrics", "picks", "starts", "quarantine"]
            names += ["eval_samples"] if run.config.evaluation.keep_losses else []
            self._files = {n: JsonLines(run.run_dir / f"{n}.jsonl", first) for n in names}
            picks = read_lines(run.run_dir / "picks.jsonl")
            self._link = last_link(picks, run.inputs.train.fingerprint)
            # The time of earlier starts, up to the last thing that counts.
            last = read_lines(run.run_dir / "metrics.jsonl")[-1:]
            self._began -= sum(record.get("elapsed_s", 0.0) for record in last)
        self._trackers = Trackers(run, self.progress.note) if self.writes else None

    def __enter__(self) -> Journal:
        run, first = self.run, self.run.state.step
        if run.changed:
            self._write("metrics", {"event": "settings", "step": first - 1, "changed": run.changed})
            for key, (was, now) in run.changed.items():
                self.progress.note(f"continues from step {first} with {key} {now} (it was {was})")
        if run.ended_early:
            self.ended_early()
        elif first >= len(run.stream):
            self.progress.note(
                f"{run.run_dir} has done {first} of {len(run.stream)} steps, nothing is left to "
                "do: raise steps or epochs, or choose another run_dir"
            )
        else:
            self._write("starts", _start(run))
        self.progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.__exit__(kind, error, trace)
        if self._trackers is not None:
            self._trackers.finish()
        for file in self._files.values():
            file.close()

    def step(self, record: StepRecord) -> None:
        """A step is done."""
        for broken in record.quarantine:
            self._write("quarantine", broken)
        if self.writes:
            self._link = chained(self._link, record.picks)
            self._write("picks", {**record.picks, KEY: self._link})
        self._write("metrics", record.metrics)
        if self._trackers is not None:
            self._trackers.step(record.metrics, record.picks["ids"])
        self.progress.advance(record.metrics)

    def evaluation(self, step: int, result: dict[str, Any]) -> None:
        """What an evaluation gave after `step`; nothing where there are no evaluation data."""
        samples = result.pop("samples", None)
        if samples:
            self._write("eval_samples", {"step": step, **samples})
        if result:
            self._write("metrics", {"event": "eval", "step": step, **result})
            if self._trackers is not None:
                self._trackers.evaluation({"step": step, **result})
            self.progress.note(f"evaluation loss {result['eval_loss']:.4f} nats per token")
            for task, marks in result.get(ANSWERS, {}).items():
                told = ", ".join(f"{name} {x:.4g}" for name, x in marks.items())
                self.progress.note(f"answers, {task or 'no task'}: {told}")

    def ended_early(self) -> None:
        """No step follows, though some were planned."""
        best, metric = self.run.state.best, self.run.config.evaluation.metric
        when = "was never finite"
        if best.value is not None:
            when = f"was best after step {best.step} ({best.value:.4f})"
        self.progress.note(
            f"ends early: {metric} {when}, and not in {best.waited} evaluations since"
        )

    def checkpoints(self) -> None:
        """The checkpoints made visible since the last call."""
        records = self.run.saver.records
        while records:
            self._write("metrics", records.pop(0))

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        if name not in self._files:
            return
        if name == "metrics":
            record = {**record, "elapsed_s": time.monotonic() - self._began}
        self._files[name].write(record)
        if name == "metrics":
            # All of them are asked. The other ranks hear of a stop in the next step.
            answers = [callback(record) for callback in self.callbacks]
            self.run.comm.heart.stop |= any(answer is True for answer in answers)


def _start(run: Run) -> dict[str, Any]:
    engine, cuda = run.config.engine.kind, run.engine.device.type == "cuda"
    versions = {"slap_ds": __version__, "torch": torch.__version__}
    if engine == "deepspeed":  # which the engine alone imports
        versions["deepspeed"] = sys.modules["deepspeed"].__version__
    versions |= {"transformers": transformers.__version__, "Python": platform.python_version()}
    return {
        "step": run.state.step,
        "steps": len(run.stream),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ranks": run.comm.world,
        "device": torch.cuda.get_device_name(run.engine.device) if cuda else "CPU",
        "model_type": run.inputs.model_config.model_type,
        "parameters": run.engine.parameters,
        "rows": asdict(run.inputs.train.counts),
        "versions": versions,
    }
