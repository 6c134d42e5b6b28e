"""eval, losses, curate: what a model has learnt, and what is worth learning."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from slap_ds.cli.common import OVERRIDES, Commands

if TYPE_CHECKING:
    from slap_ds.evaluation.chat import Endpoint


def add(commands: Commands) -> None:
    evaluate = commands.add_parser("eval", help="losses, answers and metrics of a run or a model")
    evaluate.add_argument("target", help="a run folder or a Hugging Face model folder")
    evaluate.add_argument("--data", nargs="+", default=[], help="rows (default: the run's eval)")
    evaluate.add_argument("--out", help="folder of the results (default: in the target's eval/)")
    evaluate.add_argument("--samples", type=_count, help="answers per task (default all; 0: none)")
    evaluate.add_argument("--seed", type=_count, default=0, help="seed of the subset (default 0)")
    evaluate.add_argument("--max-new-tokens", type=_positive, default=256)
    evaluate.add_argument(
        "--batch-tokens", type=_positive, default=16384, help="tokens of one batch"
    )
    evaluate.add_argument("--template", help="conversation template (default: the model's own)")
    evaluate.add_argument("--format", help="format of the rows (default: recognised)")
    evaluate.add_argument("--max-tokens", type=_longest, help="longest row (default: the run's)")
    evaluate.add_argument("--dtype", choices=["float32", "bfloat16"])
    evaluate.add_argument(
        "--attention", help="attention for the losses (default: the run's, or packed)"
    )
    harness = evaluate.add_argument_group("lm-evaluation-harness, instead of the above")
    harness.add_argument("--lm-eval", metavar="TASKS", help="names or .yaml files, with commas")
    harness.add_argument("--lm-eval-limit", type=_positive, metavar="N", help="rows of each task")
    harness.add_argument("--lm-eval-chat", action="store_true", help="use the chat template")
    compared = evaluate.add_argument_group("pairwise judging by a model")
    compared.add_argument("--judge", metavar="URL", help="an OpenAI-compatible chat endpoint")
    compared.add_argument("--judge-model", metavar="NAME")
    compared.add_argument("--against", metavar="FILE", help="another model's predictions.jsonl")
    compared.add_argument("--judge-key-env", metavar="NAME", help="variable (OPENAI_API_KEY)")
    compared.add_argument("--judge-timeout", type=_positive, default=120, metavar="SECONDS")
    compared.add_argument("--judge-tries", type=_positive, default=6, help="tries of one request")
    compared.add_argument("--judge-workers", type=_positive, default=4, help="requests at a time")
    evaluate.set_defaults(run=_evaluate)

    losses = commands.add_parser(
        "losses", help="write each training sample's loss under a model", epilog=OVERRIDES
    )
    losses.add_argument("config", help="run file; --model.path names the model")
    losses.add_argument("--out", required=True, help="JSONL file, for selection.reference_losses")
    losses.set_defaults(run=_losses, takes_overrides=True)

    curate = commands.add_parser(
        "curate", help="write the rows that a selection keeps, with their scores", epilog=OVERRIDES
    )
    curate.add_argument("config")
    curate.add_argument("--out", required=True, help="a .jsonl or .jsonl.gz file")
    curate.add_argument("--dropped", help="a file for the other rows, with their scores")
    curate.add_argument("--keep", type=float, help="share to keep (default selection.keep)")
    curate.add_argument("--run", dest="run_dir", help="what this run has picked; nothing is scored")
    curate.set_defaults(run=_curate, takes_overrides=True)


def _evaluate(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from slap_ds.answers.questions import Answering
    from slap_ds.evaluation.evaluate import evaluate
    from slap_ds.evaluation.show import show
    from slap_ds.evaluation.subject import open_subject

    target = Path(options.target)
    endpoint = _endpoint(options)
    out = Path(options.out) if options.out else None
    if options.lm_eval is None and (options.lm_eval_limit or options.lm_eval_chat):
        given = "--lm-eval-limit" if options.lm_eval_limit else "--lm-eval-chat"
        raise ValueError(f"{given} is for lm-evaluation-harness: give --lm-eval TASKS too")
    if options.lm_eval:
        _harness(options, target, out)
        return
    names = ("template", "format", "max_tokens", "dtype", "attention")
    settings = {name: getattr(options, name) for name in names}
    how = Answering(options.samples, options.max_new_tokens, options.batch_tokens, options.seed)
    with open_subject(target, out, options.data, settings) as subject:
        result, out = evaluate(subject, how), subject.out
    show(result, Console(markup=False))
    print(f"wrote {out / 'eval.json'} and {out / 'predictions.jsonl'}")
    if endpoint is not None:
        from slap_ds.evaluation.evaluate import write_json
        from slap_ds.evaluation.judge import judge
        from slap_ds.evaluation.show import show_judged
        from slap_ds.jsonl import read_lines

        chosen = read_lines(out / "predictions.jsonl")[: result["answers"]["predictions"]]
        judged = judge(chosen, read_lines(Path(options.against)), endpoint, out)
        write_json(out / "judge.json", {"against": options.against, **judged})
        show_judged(judged, Console(markup=False))
        print(f"wrote {out / 'judge.json'} and {out / 'judgements.jsonl'}")


def _harness(options: argparse.Namespace, target: Path, out: Path | None) -> None:
    from rich.console import Console

    from slap_ds.evaluation.evaluate import write_json
    from slap_ds.evaluation.harness import run_harness, show_harness
    from slap_ds.evaluation.subject import whole_folder

    with whole_folder(target, out) as folder:
        found = run_harness(folder, options.lm_eval, options.lm_eval_limit, options.lm_eval_chat)
    path = (out or target / "eval") / "lm_eval.json"
    write_json(path, {"target": str(target), **found})
    show_harness(found, Console(markup=False))
    print(f"wrote {path}")


def _endpoint(options: argparse.Namespace) -> Endpoint | None:
    """The judge that was asked for; every mistake is told before anything is computed."""
    if options.judge is None:
        return None
    try:
        from slap_ds.evaluation.chat import Endpoint, endpoint_url
    except ImportError:
        raise ValueError("--judge needs openai: pip install 'slap_ds[judge]'") from None

    for name in ("judge_model", "against"):
        if getattr(options, name) is None:
            raise ValueError(f"--judge needs --{name.replace('_', '-')} too")
    if not Path(options.against).is_file():
        raise FileNotFoundError(f"--against: no file at {options.against!r}")
    variable = options.judge_key_env or "OPENAI_API_KEY"
    key = os.environ.get(variable, "").strip()
    if options.judge_key_env and not key:
        raise ValueError(f"--judge-key-env: the environment has no variable {variable}")
    return Endpoint(
        endpoint_url(options.judge),
        options.judge_model,
        key,
        options.judge_timeout,
        options.judge_tries,
        workers=options.judge_workers,
    )


def _losses(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.config.file import read_config

    config = read_config(options.config, rest)
    from slap_ds.engine import start_ranks, stop_ranks
    from slap_ds.evaluation.reference import write_losses

    comm = start_ranks(config)
    count = write_losses(config, Path(options.out), comm)
    if count is not None:
        print(f"wrote the losses of {count} samples to {options.out}")
    stop_ranks(comm)


def _curate(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.config.file import read_config

    if options.keep is not None:
        if not 0 < options.keep <= 1:
            raise ValueError(f"--keep is {options.keep:g}, expected a share in (0, 1]")
        rest = [*rest, "--selection.keep", str(options.keep)]
    config = read_config(options.config, rest)
    from slap_ds.curate import curate, curate_run
    from slap_ds.engine import start_ranks, stop_ranks

    out, comm, counts = Path(options.out), None, None
    dropped = Path(options.dropped) if options.dropped else None
    if options.run_dir:
        counts = curate_run(config, Path(options.run_dir), out, options.keep, dropped)
    else:
        comm = start_ranks(config)
        counts = curate(config, out, comm, dropped)
    if counts is not None:
        rest_to = f", the others to {dropped}" if dropped else ""
        print(f"wrote {counts[0]} of {counts[1]} samples to {out}{rest_to}")
    if comm is not None:
        stop_ranks(comm)


def _count(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def _longest(text: str) -> int:
    if (value := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"{value} is less than 2, a prompt and an answer")
    return value


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value
