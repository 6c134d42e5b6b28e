"""How near cheaper curvatures come to that of all response tokens, and whether the picks notice.

    python benchmarks/bench_curvature.py configs/from-scratch.yaml \\
      --json benchmarks/results/curvature.json

A SLAP run in one process, trained by the picks of the curvature over all tokens. At every step the
same candidates are scored once more for each contestant, which keeps a moving average of its own.
Medians over the second half of the steps of

    step       |d - d_all| / |d_all|, the step's diagonals
    average    the same of the moving averages, which precondition
    picks      share of the picks that both make, from the same random draws

and of `noise`, the distance of a step's d_all from the moving average up to it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slap_ds.bench.environment import describe
from slap_ds.config.file import read_config
from slap_ds.data.batch import CandidateBatch
from slap_ds.scoring import Scorer, Scores
from slap_ds.selection import select
from slap_ds.train.record import train_step
from slap_ds.train.run import Run, prepare
from slap_ds.train.schedule import budget_at

ALL = "all tokens"
CONTESTANTS: dict[str, dict[str, Any]] = {
    ALL: {"curvature_tokens": 1.0},
    "1/2 of the tokens": {"curvature_tokens": 1 / 2},
    "1/4 of the tokens": {"curvature_tokens": 1 / 4},
    "1/8 of the tokens": {"curvature_tokens": 1 / 8},
    "1/16 of the tokens": {"curvature_tokens": 1 / 16},
    "64 probes": {"curvature": "hutchinson_head", "probes": 64},
    "16 probes": {"curvature": "hutchinson_head", "probes": 16},
    "4 probes": {"curvature": "hutchinson_head", "probes": 4},
    "none": {"curvature": "none"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="of a run; its engine, method and run_dir are replaced")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--json", type=Path)
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "run_dir": folder,
            "steps": options.steps,
            "engine.kind": "torch",
            "selection.method": "slap",
            "step.forward": "separate",
            "scoring.curvature_tokens": 1.0,
        }
        flags = [f"--{key}={value}" for key, value in changes.items()]
        run = prepare(read_config(options.config, [*overrides, *flags]))
        scoring = run.scorer.plan.config
        scorers = {
            name: Scorer(replace(run.scorer.plan, config=scoring.model_copy(update=settings)))
            for name, settings in CONTESTANTS.items()
        }
        steps = [compare(run, step, scorers) for step in range(options.steps)]
    half = steps[len(steps) // 2 :]
    result = {
        "noise": median(step["noise"] for step in half),
        "contestants": {
            name: {
                key: median(step[key][name] for step in half if name in step[key])
                for key in ("step", "average", "picks")
                if name in half[0][key]
            }
            for name in CONTESTANTS
        },
        "candidates": run.config.batch.candidates,
        "response_tokens": median(step["tokens"] for step in half),
        "width": run.inputs.model_config.get_text_config().hidden_size,
        "command": command(),
        **describe(),
    }
    print(f"noise of a step: {result['noise']:.3f}")
    print("| curvature | step | average | picks in common |\n| --- | --- | --- | --- |")
    for name, row in result["contestants"].items():
        cells = [f"{row[key]:.4f}" if key in row else "" for key in ("step", "average", "picks")]
        print(f"| {name} | {' | '.join(cells)} |")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def compare(run: Run, step: int, scorers: dict[str, Scorer]) -> dict[str, Any]:
    """Score one candidate batch by every contestant, then train it."""
    batch = CandidateBatch(run.inputs.train, next(run.stream))
    rows = batch.rows(range(len(batch)), run.config.score_row_tokens)
    budget = budget_at(step, len(run.stream), len(batch), run.config.selection, run.selector)
    diagonals, averages, picks = {}, {}, {}
    for name, scorer in scorers.items():
        local = run.engine.score(rows, scorer.request(step))
        scores = run.comm.gather(step, local, len(batch))
        scored = scorer.finish(scores, batch.content)
        generator = torch.Generator().manual_seed(step)
        picks[name] = select(run.selector, scored, budget, generator).picks.numpy()
        if scorer.curvature is not None:
            diagonals[name] = step_diagonal(scores)
            averages[name] = scorer.curvature.value()
    train_step(run, step, batch)
    return {
        "step": {n: distance(d, diagonals[ALL]) for n, d in diagonals.items()},
        "average": {n: distance(a, averages[ALL]) for n, a in averages.items()},
        "picks": {n: len(np.intersect1d(p, picks[ALL])) / len(p) for n, p in picks.items()},
        "noise": distance(diagonals[ALL], averages[ALL]),
        "tokens": int(batch.response_tokens.sum()),
    }


def step_diagonal(scores: Scores) -> torch.Tensor:
    """(E,) float64, the mean over the tokens that were taken."""
    assert scores.diagonal is not None
    return scores.diagonal.double().cpu() / scores.diagonal_tokens


def command() -> str:
    """How this was started, with the data's folder under the name that the documentation uses."""
    text = " ".join(["python", "benchmarks/bench_curvature.py", *sys.argv[1:]])
    data = os.environ.get("SLAP_DATA_DIR")
    return text.replace(data, "$SLAP_DATA_DIR") if data else text


def distance(value: torch.Tensor, of: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(value - of) / torch.linalg.vector_norm(of))


def median(values: Any) -> float:
    return float(f"{statistics.median(values):.4g}")


if __name__ == "__main__":
    main()
