"""The command line: slap-ds train | preview | export | convert | compare | estimate | ...

A mistake of the user's is one line on stderr and exit status 1, never a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from slap_ds import __version__
from slap_ds.launch_env import rank_said

_OVERRIDES = "then any setting of the file, such as --selection.keep 0.8"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, or 1 after an error, or 2 for wrong usage."""
    # The deepspeed launcher puts --local_rank=N before the arguments; the environment has it too.
    given = [a for a in (sys.argv[1:] if arguments is None else arguments) if not _local_rank(a)]
    parser = _parser()
    options, rest = parser.parse_known_args(given)
    if rest and not getattr(options, "takes_overrides", False):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    run: Callable[[argparse.Namespace, list[str]], None] = options.run
    try:
        run(options, rest)
    except (ValueError, FileNotFoundError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted")
    except Exception as error:
        from slap_ds.comm import RankDisagreement
        from slap_ds.run import OtherRankFailed, RankError

        if isinstance(error, OtherRankFailed):
            sys.exit(1)
        if isinstance(error, (RankDisagreement, RankError)):
            _fail(str(error), every_rank=True)
        raise


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from slap_ds.config import read_config

    config = read_config(options.config, rest)
    from slap_ds.engine import stop_ranks
    from slap_ds.run import RankError, dry_run, prepare
    from slap_ds.trainer import train

    if options.dry_run:
        console = Console()
        for name, value in dry_run(config).items():
            console.print(f"{name:>22}  {value}", highlight=False)
        return
    run = prepare(config)
    try:
        train(run)
    except ValueError as error:
        raise RankError(f"step {run.step}: {error}") from error
    except Exception as error:
        blame = run.comm.blame(error)
        if blame is not None:
            _leave(f"step {run.step}: {blame}")
        raise
    stop_ranks(run.comm)


def _preview(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from slap_ds.config import read_config
    from slap_ds.data.preview import preview
    from slap_ds.run import read_inputs

    config = read_config(options.config, rest)
    inputs = read_inputs(config)
    preview(inputs.train, inputs.tokenizer, options.count, Console())


def _export(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.export import export

    run_dir = Path(options.run_dir)
    out = export(run_dir, Path(options.out or run_dir / "model"), options.merge)
    print(f"wrote {out}")


def _generate(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.export import Answerer

    folder = Path(options.model)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"no exported model at {options.model!r}: run slap-ds export first")
    answer = Answerer(Path(options.model))
    for prompt in options.prompt:
        print(f"user: {prompt}\nassistant: {answer(prompt, options.max_new_tokens)}")


def _convert(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.models.chatglm import convert_chatglm

    convert_chatglm(
        Path(options.src),
        Path(options.dst),
        reverse=options.reverse,
        dtype=options.dtype,
        family=options.family,
    )


def _compare(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from slap_ds.report import compare

    compare([Path(run_dir) for run_dir in options.run_dirs], Console())


def _doctor(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    from slap_ds.doctor import examine, report

    found = examine(options.hostfile, options.run_dir)
    if options.json:
        print(report(found))
    else:
        console = Console(soft_wrap=True)
        for finding in found:
            line = Text(f"{finding.level:>6}  {finding.name}: {finding.text}")
            line.stylize(finding.level, 0, 6)
            console.print(line)
    if any(finding.level == "red" for finding in found):
        sys.exit(1)


def _estimate(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from slap_ds.config import read_config
    from slap_ds.estimate import Hardware, Shape, estimate
    from slap_ds.models.load import load_config

    config = read_config(options.config, rest)
    shape = Shape.of(load_config(config.model.path, config.model.config), config.model.lora)
    hardware = Hardware(options.flops_per_s, options.bytes_per_s)
    per_gpu = options.candidates_per_gpu or config.batch.candidates / options.gpus[0]
    found = [
        estimate(config, shape, options.sample_tokens, 0.5, gpus, per_gpu, hardware)
        for gpus in options.gpus
    ]
    keep = config.selection.keep
    table = Table(title=f"{shape.parameters / 1e9:.2f} B parameters, keep ratio {keep:g}")
    table.add_column("GPUs")
    for e in found:
        table.add_column(str(e.gpus), justify="right")
    for part in found[0].memory_gib:
        table.add_row(f"GiB: {part}", *(f"{e.memory_gib[part]:.2f}" for e in found))
    table.add_row("GiB per GPU", *(f"{e.total_gib:.1f}" for e in found), style="bold")
    for part in found[0].host_gib:
        table.add_row(f"GiB on its host: {part}", *(f"{e.host_gib[part]:.2f}" for e in found))
    table.add_row("candidates per step", *(str(e.candidates) for e in found))
    for part in found[0].step_s:
        table.add_row(f"seconds: {part}", *(f"{e.step_s[part]:.3f}" for e in found))
    table.add_row("step / full training", *(f"{e.ratio_to_full:.3f}" for e in found), style="bold")
    table.add_row("selection share", *(f"{e.selection_share:.2%}" for e in found))
    Console().print(table)


def _settings(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.config import config_keys

    for key, text in config_keys():
        print(f"{key}\n    {text}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slap-ds", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"slap-ds {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model", epilog=_OVERRIDES)
    train.add_argument("config", help="YAML file; `slap-ds settings` lists what it may hold")
    train.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    train.set_defaults(run=_train, takes_overrides=True)

    preview = commands.add_parser("preview", help="show the first samples", epilog=_OVERRIDES)
    preview.add_argument("config")
    preview.add_argument("--count", type=int, default=3, help="how many samples (default 3)")
    preview.set_defaults(run=_preview, takes_overrides=True)

    export = commands.add_parser("export", help="write a run's model as a Hugging Face folder")
    export.add_argument("run_dir")
    export.add_argument("--out", help="target folder (default RUN_DIR/model)")
    export.add_argument("--merge", action="store_true", help="LoRA: add the adapter into the model")
    export.set_defaults(run=_export)

    generate = commands.add_parser("generate", help="answer prompts with an exported model")
    generate.add_argument("model")
    generate.add_argument("prompt", nargs="+")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.set_defaults(run=_generate)

    convert = commands.add_parser("convert", help="published checkpoints to transformers' layout")
    layouts = convert.add_subparsers(required=True, metavar="LAYOUT")
    chatglm = layouts.add_parser("chatglm", help="ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B, and back")
    chatglm.add_argument("src", help="the published folder, downloaded whole")
    chatglm.add_argument("dst", help="a new folder")
    chatglm.add_argument("--reverse", action="store_true", help="back to the published layout")
    chatglm.add_argument("--dtype", help="float32, bfloat16, float16 (default: each tensor's own)")
    chatglm.add_argument("--family", help="chatglm2, chatglm3, glm4 (default: seen in the folder)")
    chatglm.set_defaults(run=_convert)

    compare = commands.add_parser("compare", help="runs side by side")
    compare.add_argument("run_dirs", nargs="+")
    compare.set_defaults(run=_compare)

    doctor = commands.add_parser("doctor", help="what this machine gives slap_ds")
    doctor.add_argument("--hostfile", help="check its hosts too, over ssh")
    doctor.add_argument("--run-dir", default=".", help="where the run will write (default: here)")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)

    guess = commands.add_parser("estimate", help="memory and step time by formula")
    guess.add_argument("config")
    guess.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 4096])
    guess.add_argument("--sample-tokens", type=float, default=512, help="mean tokens per sample")
    guess.add_argument("--candidates-per-gpu", type=float, help="default: the config's on --gpus 1")
    guess.add_argument("--flops-per-s", type=float, default=400e12, help="reached by one GPU")
    guess.add_argument("--bytes-per-s", type=float, default=40e9, help="all-gather, per GPU")
    guess.set_defaults(run=_estimate, takes_overrides=True)

    settings = commands.add_parser("settings", help="every setting of a config file, explained")
    settings.set_defaults(run=_settings)
    return parser


def _local_rank(argument: str) -> bool:
    return argument.startswith(("--local_rank=", "--local-rank="))


def _leave(message: str) -> None:
    """Fail without what runs at a normal exit: DeepSpeed would wait for ranks that have gone."""
    from slap_ds.peers import GRACE_S

    try:
        _fail(message, every_rank=True)
    finally:
        time.sleep(GRACE_S)
        os._exit(1)


def _fail(message: str, every_rank: bool = False) -> None:
    rank = rank_said(os.environ)
    if rank == 0 or every_rank:
        where = f" (rank {rank})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"slap-ds: error{where}: {message}", file=sys.stderr, flush=True)
    sys.exit(1)
