"""`slap-ds train --dry-run`: everything short of weights, what the run will take, what is odd."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slap_ds import jsonl
from slap_ds.checkpoint import find as checkpoints
from slap_ds.config.deepspeed import resolve_deepspeed
from slap_ds.config.schema import Config
from slap_ds.estimate import GPUS, Gpu, Shape
from slap_ds.estimate.outlook import Outlook, Tokens, outlook
from slap_ds.launch.environment import ranks_said
from slap_ds.models.load import check_weights
from slap_ds.selection import make_selector
from slap_ds.train.exam import read_exam
from slap_ds.train.inputs import Inputs, make_parts, read_inputs, settled
from slap_ds.train.schedule import budget_at
from slap_ds.train.trackers import check_trackers

_FIRST_REASONS = 3


@dataclass
class DryRun:
    """What there is to print."""

    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)  # what works, and is probably not meant


def dry_run(config: Config, gpus: int | None = None) -> DryRun:
    """Check a run without its weights, and say what it will do and take.

    Args:
        gpus: it will have; default: as many as a launcher started ranks, else those of this
            machine.

    Raises:
        ValueError, FileNotFoundError: what `prepare` would raise.
    """
    make_selector(config.selection.model_dump())
    check_trackers(config)
    run_dir = Path(config.run_dir)
    # The folder of a run that has begun keeps the rejects of what it trains on.
    begun = (run_dir / "metrics.jsonl").exists()
    inputs = read_inputs(config, write_rejects=not begun)
    exam = read_exam(config, inputs) if config.evaluation.answers else None
    fetched = config.model.path is not None and not check_weights(config.model.path)
    gpus = gpus or ranks_said(os.environ, "WORLD_SIZE", 0) or torch.cuda.device_count() or 1
    config = settled(config, inputs, gpus)
    stream, _, selector = make_parts(config, inputs.train)
    text = inputs.model_config.get_text_config()
    if config.engine.kind == "deepspeed":
        resolve_deepspeed(config, gpus, text.hidden_size)
    steps, candidates, train = len(stream), config.batch.candidates, inputs.train
    gpu = _this_gpu()
    lengths = train.lengths
    tokens = Tokens(float(lengths.mean()), float(train.trained_tokens.sum() / lengths.sum()))
    shape = Shape.of(inputs.model_config, config.model.lora)
    ahead = outlook(config, shape, replace(tokens, samples=len(train)), gpus, candidates, gpu)
    facts = {
        "training samples": f"{len(train):,}",
        "evaluation samples": f"{len(inputs.eval) if inputs.eval else 0:,}",
        **({"answered samples": f"{len(exam.questions):,}"} if exam else {}),
        "tokens": f"{int(lengths.sum()):,}",
        "trained tokens": f"{int(train.trained_tokens.sum()):,}",
        "rejected rows": _rejects(inputs, run_dir, begun),
        "cut to max_tokens": f"{train.counts.truncated:,}",
        "left out": f"{train.counts.dropped_too_long:,} too long, "
        f"{train.counts.dropped_no_trained_tokens:,} without a trained token",
        "steps": steps,
        "candidates per step": candidates,
        "trained per step": budget_at(steps // 2, steps, candidates, config.selection, selector),
        "epochs of candidates": round(stream.total / len(train), 2),
        "model": f"{inputs.model_config.model_type}, {text.num_hidden_layers} blocks of width "
        f"{text.hidden_size}, vocabulary {text.vocab_size}",
        f"on {gpus} {gpu.name}": "by formula (slap-ds estimate has its parts)",
        "memory": f"{ahead.estimate.needed_gib:.1f} of {gpu.gib:.0f} GiB a GPU",
        "time": _duration(ahead.hours or 0.0),
        "disk": f"{ahead.disk_bytes / 1e9:.2g} GB for {config.checkpoint.at_once} "
        f"checkpoints, {_free(run_dir) / 1e9:,.0f} GB free",
    }
    found = DryRun(facts)
    found.notes += _about_data(config, inputs, steps)
    found.notes += _about_folder(run_dir, steps)
    found.notes += _about_size(ahead, gpu, run_dir)
    if fetched:
        found.notes.append(f"the weights of {config.model.path} are not here: they will be fetched")
    return found


def _this_gpu() -> Gpu:
    """That of this machine; without one an H100."""
    if not torch.cuda.is_available():
        return GPUS["h100"]
    properties = torch.cuda.get_device_properties(0)
    near = [gpu for key, gpu in GPUS.items() if key.split("-")[0].upper() in properties.name]
    like = near[-1] if near else GPUS["h100"]
    return Gpu(properties.name, properties.total_memory / 2**30, like.flops_per_s)


def _rejects(inputs: Inputs, run_dir: Path, begun: bool) -> str:
    count = inputs.train.counts.rejected
    if not count:
        return "0"
    folder = inputs.train.folder if begun else run_dir
    told = f"{count:,} ({folder / 'rejects.jsonl'})"
    for line in jsonl.read_lines(inputs.train.folder / "rejects.jsonl")[:_FIRST_REASONS]:
        told += f"\n{'':>24}{Path(line['file']).name}, line {line['line']}: {line['reason']}"
    return told


def _about_data(config: Config, inputs: Inputs, steps: int) -> list[str]:
    notes, samples, candidates = [], len(inputs.train), config.batch.candidates
    if config.optimizer.warmup_steps >= steps:
        notes.append(
            f"optimizer.warmup_steps is {config.optimizer.warmup_steps} and the run has {steps} "
            "steps: the learning rate never gets past its warm-up"
        )
    if candidates > samples:
        notes.append(
            f"batch.candidates is {candidates} and there are {samples} samples: a step draws some "
            "of them more than once"
        )
    if inputs.eval is not None and len(inputs.eval):
        shared = int(np.isin(inputs.eval.content, inputs.train.content).sum())
        if shared:
            notes.append(
                f"{shared:,} of {len(inputs.eval):,} evaluation samples are trained on: their "
                "losses say nothing about others; take them out of data.train or data.eval"
            )
    return notes


def _about_folder(run_dir: Path, steps: int) -> list[str]:
    found = checkpoints.find(run_dir)
    if not found:
        return []
    done = found[-1].step
    if done >= steps:
        return [
            f"run_dir {str(run_dir)!r} holds a run that has done {done} of {steps} steps: it is "
            "finished, nothing would be trained; name another run_dir"
        ]
    return [f"run_dir {str(run_dir)!r} holds a run, which continues after step {done}"]


def _about_size(ahead: Outlook, gpu: Gpu, run_dir: Path) -> list[str]:
    notes, e = [], ahead.estimate
    if not ahead.fits:
        notes.append(
            f"a GPU needs about {e.needed_gib:.0f} GiB and a {gpu.name} has {gpu.gib:.0f}: take "
            "more GPUs, a DeepSpeed file with offload (configs/deepspeed), or model.lora"
        )
    if ahead.disk_bytes > _free(run_dir):
        notes.append(
            f"checkpoints take up to {ahead.disk_bytes / 1e9:.0f} GB and {_free(run_dir) / 1e9:.0f}"
            " GB are free: lower checkpoint.keep_last, or choose another run_dir"
        )
    return notes + ([ahead.advice] if ahead.advice else [])


def _free(folder: Path) -> int:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _duration(hours: float) -> str:
    minutes = math.ceil(60 * hours)
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{minutes} minutes" if minutes > 1 else "at most a minute"
