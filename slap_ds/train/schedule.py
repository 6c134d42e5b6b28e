"""What depends on the number of the step alone: the learning rate and the budget."""

from __future__ import annotations

import math

from slap_ds.config.schema import Config, SelectionConfig
from slap_ds.selection import Selector


def budget_at(
    step: int, steps: int, candidates: int, selection: SelectionConfig, selector: Selector
) -> int:
    """M at `step`: the selector's, or all N in the warm-up and cool-down."""
    warm = step < selection.warmup * steps
    cool = step >= steps - selection.cooldown * steps
    if warm or cool:
        return candidates
    return selector.budget(step, steps, candidates, selection.keep)


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warm-up to the peak, then a cosine down to min_lr_ratio of it at the last step."""
    o = config.optimizer
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    progress = (step - o.warmup_steps) / max(1, steps - 1 - o.warmup_steps)
    share = o.min_lr_ratio + (1 - o.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
    return o.lr * share
