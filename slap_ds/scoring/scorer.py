"""From the gathered sums of a candidate batch to what a selector sees.

    Scores of all ranks -> mean over response tokens -> curvature update -> sketch -> ScoredBatch

The sums arrive in candidate order and are the same on every rank, so everything here is too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slap_ds.device import to_device
from slap_ds.scoring.curvature import Curvature
from slap_ds.scoring.head import HeadScores
from slap_ds.scoring.plan import ScoringPlan
from slap_ds.scoring.probes import fixed_projection
from slap_ds.scoring.request import ScoreRequest
from slap_ds.selection import ScoredBatch, Signal


@dataclass(frozen=True)
class Scores:
    """Sums of some candidates: a rank's share, or after the gather the whole batch."""

    positions: Tensor  # (n,) int64, in the candidate batch
    loss: Tensor  # (n,) float32, nats summed over response tokens
    tokens: Tensor  # (n,) int64, response tokens
    gradient: Tensor | None = None  # (n, D) float32 or bfloat16: the sketch, summed over tokens
    diagonal: Tensor | None = None  # (E,) float32, summed over `diagonal_tokens` tokens
    diagonal_tokens: int = 0  # how many tokens the diagonal is a sum over, all of finite loss
    extras: Tensor | None = None  # (n, S) float32, columns in the order of `ScoreRequest.extras`

    def mean_loss(self) -> Tensor:
        """(n,) nats per response token; NaN where a sample has none."""
        return self.loss / self.tokens


def collect(
    positions: Sequence[Tensor], parts: Sequence[HeadScores], request: ScoreRequest
) -> Scores:
    """One rank's rows, scored one by one, as its share of the batch, in candidate order."""
    where = torch.cat(list(positions))
    order = where.argsort()
    gradients = [part.gradient for part in parts if part.gradient is not None]
    diagonals = [part.diagonal for part in parts if part.diagonal is not None]
    counts = [part.diagonal_tokens for part in parts if part.diagonal_tokens is not None]
    extras = [part.extras for part in parts if part.extras is not None]
    gradient = _placed(gradients, order) if gradients else None
    if gradient is not None and request.sketch_dim is not None:
        gradient = project(gradient, request)
    if gradient is not None and request.bfloat16:
        gradient = gradient.bfloat16()

    def ordered(values: list[Tensor]) -> Tensor:
        return torch.cat(values)[to_device(order, values[0].device)]

    return Scores(
        positions=where[order],
        loss=ordered([part.loss for part in parts]),
        tokens=ordered([part.tokens for part in parts]),
        gradient=gradient,
        diagonal=torch.stack(diagonals).sum(0) if diagonals else None,
        diagonal_tokens=int(torch.stack(counts).sum()) if counts else 0,
        extras=ordered(extras) if extras else None,
    )


def _placed(parts: list[Tensor], order: Tensor) -> Tensor:
    """`torch.cat(parts)[order]` without holding that twice: sketches are large."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    whole = parts[0].new_empty(len(order), *parts[0].shape[1:])
    for part, at in zip(parts, place.split([len(part) for part in parts]), strict=True):
        whole[to_device(at, part.device)] = part
    return whole


def project(gradient: Tensor, request: ScoreRequest) -> Tensor:
    """(n, E) -> (n, D): scaled, then projected by signs that all steps and ranks share.

    Inner products are kept: E <Px, Py> = <x, y>, Var <Px, Py> <= 2 / D |x|^2 |y|^2.
    """
    assert request.sketch_dim is not None
    p = fixed_projection(request.seed, request.sketch_dim, gradient.shape[1])
    p = to_device(p, gradient.device, gradient.dtype)
    if request.scale is not None:
        gradient = gradient * request.scale.to(gradient)
    return gradient @ p.t()


class Scorer:
    """Turns gathered sums into a `ScoredBatch`; holds the curvature as its state."""

    def __init__(self, plan: ScoringPlan) -> None:
        self.plan = plan
        self.curvature: Curvature | None = plan.curvature()

    @property
    def needs(self) -> frozenset[Signal]:
        return self.plan.needs

    def request(self, step: int) -> ScoreRequest:
        """What this step's scoring forward computes."""
        return self.plan.request(step, self.curvature)

    def finish(
        self, scores: Scores, content: Tensor, validation: Scores | None = None
    ) -> ScoredBatch:
        """The scored candidate batch.

        Args:
            scores: of all N candidates, in candidate order.
            content: (N,) int64, equal where samples are equal token for token.
            validation: of the samples that selection looks at beside the candidates.
        """
        loss = scores.mean_loss()
        if self.curvature is not None and scores.diagonal is not None:
            self.curvature.update(scores.diagonal, scores.diagonal_tokens)
        sketch = self.sketch(scores)
        # Equal samples have equal scores; packing and the number of ranks round them differently
        # in the last bit, and a tie between twins must not be decided by that.
        first = first_occurrence(content)
        scored = ScoredBatch(loss=loss, sketch=sketch, **self._extras(scores))
        if not torch.equal(first, torch.arange(len(first))):  # a copy of all sketches
            scored = scored.take(first)
        mean = None if validation is None else self._mean_sketch(validation)
        return replace(scored.to_host(), validation=mean)

    def _mean_sketch(self, scores: Scores) -> Tensor:
        """(D,): the mean sketch of the samples that have a finite one."""
        sketch = self.sketch(scores)
        assert sketch is not None
        finite = sketch[torch.isfinite(sketch).all(1)]
        if not len(finite):
            raise ValueError(
                "no validation sample has a finite gradient: the model has diverged (lower "
                "optimizer.lr) or its weights are broken"
            )
        return finite.mean(0)

    def _extras(self, scores: Scores) -> dict[str, Any]:
        """What is wanted of el2n (n,), nuclear (n,) and hidden (n, E), as selectors see them."""
        if scores.extras is None:
            return {}
        names = self.plan.extras
        found: dict[str, Any] = {name: scores.extras[:, i] for i, name in enumerate(names)}
        if "hidden" in names:
            found["hidden"] = scores.extras[:, len(names) - 1 :] / scores.tokens[:, None]
        if "el2n" in names:  # the nuclear norm is that of the whole answer
            found["el2n"] = found["el2n"] / scores.tokens
        return found

    def sketch(self, scores: Scores) -> Tensor | None:
        """(n, D) float32 from sums of any n candidates, with the curvature as `finish` left it."""
        if scores.gradient is None:
            return None
        sketch = scores.gradient.float() / scores.tokens[:, None]  # the only copy
        if self.curvature is not None and not self.plan.projects:
            sketch = self.curvature.precondition_(sketch)
        if self.plan.config.sketch_norm == "unit":
            norm = torch.linalg.vector_norm(sketch, dim=1, keepdim=True)
            sketch.div_(norm.clamp(min=torch.finfo(torch.float32).tiny))
        return sketch

    def state_dict(self) -> dict[str, Any]:
        return {} if self.curvature is None else {"curvature": self.curvature.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.curvature is not None and "curvature" in state:
            self.curvature.load_state_dict(state["curvature"])


def first_occurrence(content: Tensor) -> Tensor:
    """(N,) -> (N,): for each entry, the index of the first equal entry."""
    _, group = content.unique(return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(content), dtype=torch.int64)
    first.scatter_reduce_(0, group.cpu(), torch.arange(len(content)), "amin")
    return first[group.cpu()]
