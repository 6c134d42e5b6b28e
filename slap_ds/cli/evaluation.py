"""eval: what a model has learnt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from slap_ds.cli.common import Commands


def add(commands: Commands) -> None:
    evaluate = commands.add_parser("eval", help="losses, answers and metrics of a run or a model")
    evaluate.add_argument("target", help="a run folder or a Hugging Face model folder")
    evaluate.add_argument("--data", nargs="+", default=[], help="rows (default: the run's eval)")
    evaluate.add_argument("--out", help="folder of the results (default: in the target's eval/)")
    evaluate.add_argument("--samples", type=_count, help="answers per task (default all; 0: none)")
    evaluate.add_argument("--seed", type=_count, default=0, help="of the subset (default 0)")
    evaluate.add_argument("--max-new-tokens", type=_positive, default=256)
    evaluate.add_argument("--batch-tokens", type=_positive, default=16384, help="of one batch")
    evaluate.add_argument("--template", help="conversation template (default: the model's own)")
    evaluate.add_argument("--format", help="format of the rows (default: recognised)")
    evaluate.add_argument("--max-tokens", type=_positive, help="longest row (default: the run's)")
    evaluate.add_argument("--dtype", choices=["float32", "bfloat16"])
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from slap_ds.evaluation.evaluate import Limits, evaluate
    from slap_ds.evaluation.show import show
    from slap_ds.evaluation.subject import open_subject

    target = Path(options.target)
    out = Path(options.out) if options.out else None
    settings: dict[str, Any] = {
        name: getattr(options, name) for name in ("template", "format", "max_tokens", "dtype")
    }
    limits = Limits(options.samples, options.max_new_tokens, options.batch_tokens, options.seed)
    with open_subject(target, out, options.data, settings) as subject:
        result, out = evaluate(subject, limits), subject.out
    show(result, Console())
    print(f"wrote {out / 'eval.json'} and {out / 'predictions.jsonl'}")


def _count(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value
