"""estimate: what a run takes on so many GPUs, by formula."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from slap_ds.cli.common import OVERRIDES, Commands
from slap_ds.errors import mistake
from slap_ds.report.numbers import size_text

if TYPE_CHECKING:
    from rich.table import Table

    from slap_ds.config.schema import Config
    from slap_ds.estimate.hardware import Gpu
    from slap_ds.estimate.outlook import Outlook, Tokens

_KINDS = ("a100-40", "a100-80", "h100", "h200", "b200")


def add(commands: Commands) -> None:
    guess = commands.add_parser(
        "estimate", help="memory, time and disk of a run, by formula", epilog=OVERRIDES
    )
    guess.add_argument("config")
    guess.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    guess.add_argument("--gpu", choices=_KINDS, default="h100", help="kind of GPU (default h100)")
    guess.add_argument(
        "--sample-tokens", type=float, help="mean tokens per sample (default: counted in the data)"
    )
    guess.add_argument("--response-share", type=float, help="share of the tokens that is trained")
    guess.add_argument(
        "--candidates-per-gpu", type=float, help="default: the run's own candidates, on any number"
    )
    guess.add_argument("--flops-per-s", type=float, help="FLOP/s that one GPU reaches")
    guess.add_argument("--bytes-per-s", type=float, help="bytes/s at which a GPU gathers weights")
    guess.set_defaults(run=_estimate, takes_overrides=True)


def _estimate(options: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from slap_ds.config.file import read_config
    from slap_ds.estimate import GPUS, Hardware, Shape
    from slap_ds.estimate.outlook import Tokens, outlook
    from slap_ds.models.load import load_config
    from slap_ds.train.inputs import settle_candidates

    if min(options.gpus) < 1:
        raise ValueError(f"--gpus is {options.gpus}, expected numbers of GPUs from 1")
    config = read_config(options.config, rest)
    model_config = load_config(config.model.path, config.model.config)
    shape = Shape.of(model_config, config.model.lora)
    told = ""
    tokens = Tokens()
    if options.sample_tokens is None:
        tokens, told = _counted(config)
    else:
        tokens = replace(tokens, mean=options.sample_tokens)
    if options.response_share is not None:
        tokens = replace(tokens, response_share=options.response_share)
    gpu, found = GPUS[options.gpu], []
    for gpus in options.gpus:
        hardware = Hardware.of(gpu, gpus)
        hardware = replace(
            hardware,
            flops_per_s=options.flops_per_s or hardware.flops_per_s,
            gather_bytes_per_s=options.bytes_per_s or hardware.gather_bytes_per_s,
        )
        mine = settle_candidates(config, model_config, tokens.mean, tokens.response_share, gpus)
        candidates = mine.batch.candidates
        if options.candidates_per_gpu:
            candidates = max(1, round(options.candidates_per_gpu * gpus))
        found.append((hardware, outlook(mine, shape, tokens, gpus, candidates, gpu, hardware)))
    # A pipe has no width; a table cut to 80 columns would lose its numbers.
    console = Console(markup=False, highlight=False, soft_wrap=True)
    wide = Console(markup=False, width=max(80, 48 + 12 * len(found)))
    console.print(
        f"{size_text(shape.parameters)} parameters, {_assumed(config, tokens, gpu)}{told}"
    )
    rates = {(h.flops_per_s, h.gather_bytes_per_s) for h, _ in found}
    for flops, gathered in sorted(rates):
        which = [o.estimate.gpus for h, o in found if h.gather_bytes_per_s == gathered]
        console.print(
            f"assumed on {', '.join(map(str, which))} GPU{'s' * (which != [1])}: "
            f"{flops / 1e12:g} TFLOP/s a GPU, weights gathered at {gathered / 1e9:g} GB/s a GPU"
        )
    wide.print(_table([o for _, o in found], config))
    for _, each in found:
        if each.advice:
            console.print(each.advice)


def _counted(config: Config) -> tuple[Tokens, str]:
    """Of the run's own data, if they can be read; and what to say of it."""
    from slap_ds.estimate.outlook import Tokens
    from slap_ds.train.inputs import read_inputs

    try:
        store = read_inputs(config, write_rejects=False).train
    except (ValueError, OSError) as error:
        if (why := mistake(error)) is None:
            raise
        return Tokens(), f"\nassumed, since the data cannot be read ({why.splitlines()[0]})"
    mean = float(store.lengths.mean())
    share = float(store.trained_tokens.sum() / store.lengths.sum())
    return Tokens(mean, share, len(store)), f", counted in {len(store):,} samples"


def _assumed(config: Config, tokens: Tokens, gpu: Gpu) -> str:
    return (
        f"{config.selection.method}, keep {config.selection.keep:g}, rows of "
        f"{config.batch.micro_batch_tokens:,} tokens, {gpu.name}; {tokens.mean:.0f} tokens a "
        f"sample, {tokens.response_share:.0%} of them trained"
    )


def _table(found: list[Outlook], config: Config) -> Table:
    from rich.table import Table

    from slap_ds.estimate import GPUS

    table = Table()
    table.add_column("GPUs")
    each = [o.estimate for o in found]
    for e in each:
        table.add_column(f"{e.gpus:,}", justify="right")
    for part in each[0].memory_gib:
        table.add_row(f"GiB: {part}", *(f"{e.memory_gib[part]:.2f}" for e in each))
    table.add_row("GiB counted", *(f"{e.total_gib:.1f}" for e in each))
    needed = "GiB needed (a tenth and 2 GiB more)"
    table.add_row(needed, *(f"{e.needed_gib:.1f}" for e in each), style="bold")
    for gpu in GPUS.values():
        fits = ["fits" if e.needed_gib <= gpu.gib else "too small" for e in each]
        table.add_row(f"  {gpu.name}, {gpu.gib:g} GiB free", *fits)
    for part in each[0].host_gib:
        table.add_row(f"GiB a GPU on its host: {part}", *(f"{e.host_gib[part]:.2f}" for e in each))
    table.add_row("candidates a step", *(f"{e.candidates:,}" for e in each))
    table.add_row("full training's rows a GPU", *(f"{e.rows:.2g}" for e in each))
    if config.engine.sequence_parallel > 1:
        sent = "MiB a GPU sends a layer in a row's forward"
        table.add_row(sent, *(f"{e.exchanged_mib:.1f}" for e in each))
    for part in each[0].step_s:
        table.add_row(f"seconds a step: {part}", *(f"{e.step_s[part]:.3f}" for e in each))
    table.add_row("step / full training", *(f"{e.ratio_to_full:.3f}" for e in each), style="bold")
    table.add_row("selection's share", *(f"{e.selection_share:.2%}" for e in each))
    steps = ["data not read" if o.steps is None else f"{o.steps:,}" for o in found]
    table.add_row("steps", *steps)
    hours = ["data not read" if o.hours is None else f"{o.hours:.1f}" for o in found]
    table.add_row("hours, without evaluation", *hours, style="bold")
    table.add_row("GB a checkpoint", *(f"{o.checkpoint_bytes / 1e9:.1f}" for o in found))
    kept = f"GB on disk ({config.checkpoint.at_once - 1} checkpoints and one being written)"
    table.add_row(kept, *(f"{o.disk_bytes / 1e9:.1f}" for o in found))
    return table
