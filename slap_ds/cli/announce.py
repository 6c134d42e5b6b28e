"""What `slap-ds train` says beside its progress: one line a phase, on stderr, by rank 0."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from slap_ds.errors import counted
from slap_ds.launch.environment import rank_said
from slap_ds.report.numbers import size_text

if TYPE_CHECKING:
    from slap_ds.train.run import Run


def tell(text: str) -> None:
    """A line on stderr, by rank 0."""
    if rank_said(os.environ) == 0:
        print(f"slap-ds: {text}", file=sys.stderr, flush=True)


def about(run: Run, config_file: str) -> None:
    """What is going to be trained, on what, by which rule."""
    import torch

    inputs, config, comm = run.inputs, run.config, run.comm
    selection = config.selection
    evaluated = f", {len(inputs.eval):,} to evaluate" if inputs.eval is not None else ""
    kept = "all" if selection.method == "full" else f"{selection.method}, keep {selection.keep:g},"
    done, steps = run.state.step, len(run.stream)
    rest = f"{steps:,} steps" if done == 0 else f"continues after {done:,} of {steps:,} steps"
    tell(
        f"{inputs.model_config.model_type}, {size_text(run.engine.parameters)} parameters; "
        f"{len(inputs.train):,} samples{evaluated}; {kept} of {run.stream.candidates:,} candidates "
        f"a step; {rest}; {counted(comm.world, 'rank')} on {run.engine.device.type}"
    )
    seen = torch.cuda.device_count()
    if seen > 1 and comm.world == 1:
        tell(
            f"this machine has {seen} GPUs and one process uses one of them; all of them: "
            f"deepspeed --num_gpus {seen} --module slap_ds train {config_file}"
        )


def finished(run: Run) -> None:
    """Where it is, and what comes next."""
    where, best = run.config.run_dir, run.state.best
    if run.config.checkpoint.best and best.step:
        tell(f"the best checkpoint is that after step {best.step}: slap-ds export {where} --best")
    tell(
        f"done, {counted(run.state.step, 'step')} in {where}; next: slap-ds report {where}, "
        f"slap-ds eval {where}, slap-ds export {where}"
    )
