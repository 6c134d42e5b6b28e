"""`slap_ds.select`: one choice among candidates that somebody else has scored."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from slap_ds.config.file import validated
from slap_ds.config.schema import SelectionConfig
from slap_ds.selection import Course, ScoredBatch, Selection, Selector, make_selector
from slap_ds.selection import select as select_finite

# What can be made a tensor: a tensor, an array, a list of numbers.
Numbers: TypeAlias = Any


def select(
    losses: Numbers | ScoredBatch,
    sketches: Numbers | None = None,
    keep: float = 0.6,
    *,
    method: str = "slap",
    seed: int = 0,
    lr: float = 0.0,
    tokens: Numbers | None = None,
    response_tokens: Numbers | None = None,
    ids: Numbers | None = None,
    **settings: Any,
) -> Selection:
    """Choose the candidates of one step.

    Args:
        losses: (N,) nats per response token; or what `slap_ds.score` returned, sketches and all.
        sketches: (N, D), what stands for each sample's gradient; of slap and other methods that
            compare samples. Rows are taken as they are.
        keep: M / N in (0, 1], the share to choose.
        method: any of `selection.method`, registered ones too.
        seed: of the method's random draws; equal seeds give equal picks.
        lr: learning rate of the step, which greats looks at.
        tokens: (N,) whole numbers, of prompt and answer together; of sampled.
        response_tokens: (N,) whole numbers, of them that are trained; of sampled.
        ids: (N,) whole numbers, of methods that know samples by their ids.
        settings: the method's own, as in its section of `selection` (slap: strata, budgets, ...).

    Returns: `picks` (M,) int64, positions among the candidates; `weights` (M,) float32, of each in
        the loss; `stats`, what the method has to say. Candidates whose scores are NaN or infinite
        are never picked.

    Raises:
        ValueError: shapes or lengths that do not fit, an unknown method or setting, scores that
            the method needs and nobody gave, or no candidate with finite scores.

    >>> select([0.5, 3.0, 1.0, 2.0], keep=0.5, method="hard").picks
    tensor([1, 3])
    """
    batch = _batch(losses, sketches, tokens, response_tokens, ids, lr)
    selector = _selector(method, keep, settings)
    n = len(batch)
    sizes = {"tokens", "response_tokens"} if method == "sampled" else set()
    wanted = sorted({*selector.needs, *sizes})
    if missing := [name for name in wanted if getattr(batch, name) is None]:
        raise ValueError(
            f"method {method} needs {', '.join(missing)} of each candidate and got none: "
            f"slap_ds.score(model, batch, needs={wanted}) computes what it can"
        )
    known = batch.ids if batch.ids is not None else torch.arange(n)
    selector.begin(Course(known, 1, n))
    generator = torch.Generator().manual_seed(seed)
    return select_finite(selector, batch, selector.budget(0, 1, n, keep), generator)


def _selector(method: str, keep: float, settings: dict[str, Any]) -> Selector:
    raw: dict[str, Any] = {"method": method, "keep": keep}
    if settings:
        raw[method if method in SelectionConfig.model_fields else "options"] = settings
    try:
        return make_selector(validated(SelectionConfig, raw, "slap_ds.select").model_dump())
    except TypeError as error:  # settings that a selector from elsewhere does not know
        raise ValueError(f"slap_ds.select: method {method}: {error}") from None


def _batch(
    losses: Numbers | ScoredBatch,
    sketches: Numbers | None,
    tokens: Numbers | None,
    response_tokens: Numbers | None,
    ids: Numbers | None,
    lr: float,
) -> ScoredBatch:
    if isinstance(losses, ScoredBatch):
        if any(value is not None for value in (sketches, tokens, response_tokens, ids)):
            raise ValueError(
                "slap_ds.select: a ScoredBatch has sketches, tokens and ids of its own"
            )
        return losses
    loss = _tensor("losses", losses, torch.float32)
    if loss.dim() != 1 or not len(loss):
        raise ValueError(f"losses have shape {tuple(loss.shape)}, expected (N,) with N >= 1")
    each = {"tokens": tokens, "response_tokens": response_tokens, "ids": ids}
    found: dict[str, Any] = {
        name: _tensor(name, value, torch.int64) for name, value in each.items() if value is not None
    }
    if sketches is not None:
        found["sketch"] = _tensor("sketches", sketches, torch.float32)
        if found["sketch"].dim() != 2:
            raise ValueError(f"sketches have shape {tuple(found['sketch'].shape)}, expected (N, D)")
    for name, value in found.items():
        if len(value) != len(loss) or (name != "sketch" and value.dim() != 1):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} for {len(loss)} losses: one row each"
            )
    return ScoredBatch(loss=loss, lr=lr, **found)


def _tensor(name: str, values: Numbers, dtype: torch.dtype) -> Tensor:
    try:
        made = values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
        return made.detach().to(dtype).contiguous()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be made a tensor: {error}") from None
