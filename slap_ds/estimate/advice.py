"""Whether a run is faster than full training by the formula, and what to set where it is not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from slap_ds.config.schema import Config
from slap_ds.estimate import GPUS, Estimate, Gpu, Hardware, Shape, estimate
from slap_ds.selection import make_selector

# Of rows that samples of many lengths fill: one row more on a rank is one more on all of them.
FILLED = 0.9
_MOST_ROWS = 16  # that a GPU is advised to fill in a step
_SHORT_S = 0.01  # steps for which the formula, without what a step costs beside it, says nothing
_LITTLE = 0.8  # of full training's time: beyond, a remedy is named


def advice(
    config: Config,
    shape: Shape,
    sample_tokens: float,
    response_share: float,
    e: Estimate,
    gpu: Gpu,
    hardware: Hardware,
) -> str | None:
    """One sentence where `e`, the estimate of this configuration, gains little or nothing over full
    training; None where it gains what can be had."""
    ratio = e.ratio_to_full
    if config.selection.method == "full" or ratio <= _LITTLE or e.full_step_s < _SHORT_S:
        return None
    remedy = None
    for kind in _remedies(config, e, shape):
        tried = [
            (text, estimate(c, shape, sample_tokens, response_share, e.gpus, n, hardware))
            for text, c, n in kind
        ]
        # What does not fit is no remedy, unless nothing does.
        fitting = [(t, x) for t, x in tried if x.needed_gib <= max(gpu.gib, e.needed_gib)]
        least = min((x.ratio_to_full for _, x in fitting), default=ratio)
        if least <= min(0.9 * ratio, 0.95):
            remedy = next((t, x) for t, x in fitting if x.ratio_to_full <= 1.05 * least)
            break
    if ratio > 1.005:
        how = "slower than"
    elif ratio > 0.995:
        how = "no faster than"
    elif remedy is None:
        return None
    else:
        how = "hardly faster than"
    told = (
        f"{e.gpus} GPU{'s' * (e.gpus > 1)}: {how} full training with these settings ({ratio:.2f} "
        f"of its time, {e.rows:.2g} rows of {config.batch.micro_batch_tokens:,} tokens a GPU)"
    )
    if remedy is None:
        return f"{told}: set selection.method full"
    return f"{told}: set {remedy[0]} ({remedy[1].ratio_to_full:.2f})"


def fewest_rows(
    config: Config, shape: Shape, sample_tokens: float, response_share: float, gpus: int
) -> int:
    """Rows a rank, full training's, from which on more of them hardly make a step cheaper in
    relation to full training: by at most a tenth, up to 16 rows."""
    shared = config.engine.groups(gpus) / gpus
    per_row = FILLED * config.batch.micro_batch_tokens * shared / sample_tokens
    hardware = Hardware.of(GPUS["h100"], gpus)  # slower ones wait less for their weights
    ratios = [
        estimate(
            config, shape, sample_tokens, response_share, gpus, rows * per_row, hardware
        ).ratio_to_full
        for rows in range(1, _MOST_ROWS + 1)
    ]
    return 1 + next(i for i, ratio in enumerate(ratios) if ratio <= 1.1 * min(ratios))


def _remedies(
    config: Config, e: Estimate, shape: Shape
) -> Iterator[list[tuple[str, Config, float]]]:
    """Kinds of them, the one that changes least first: each [(what to set, config, candidates a
    GPU)], smallest first."""
    doubled = (2**i for i in itertools.count(1))
    more = list(itertools.takewhile(lambda f: f * e.rows <= _MOST_ROWS, doubled))
    per_gpu = e.candidates / e.gpus
    yield [(f"batch.candidates {f * e.candidates}", config, f * per_gpu) for f in more]
    row = config.batch.micro_batch_tokens
    longer = {f * row: _with(config, "batch", micro_batch_tokens=f * row) for f in (2, 4)}
    yield [
        (
            f"batch.micro_batch_tokens {tokens} and batch.candidates {f * e.candidates}",
            c,
            f * per_gpu,
        )
        for tokens, c in longer.items()
        for f in more
    ]
    if config.scoring.sketch != "head_kron" and shape.width > 256:
        narrow = _with(config, "scoring", sketch_dim=256)
        yield [("scoring.sketch_dim 256", narrow, per_gpu)]
    if make_selector(config.selection.model_dump()).needs:
        yield [("selection.method sampled", _with(config, "selection", method="sampled"), per_gpu)]


def _with(config: Config, section: str, **changes: Any) -> Config:
    part = getattr(config, section)
    return config.model_copy(update={section: part.model_copy(update=changes)})
