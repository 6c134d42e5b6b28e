"""The selector's contract: a scored candidate batch in, the picks out.

A selector is deterministic and blind to ranks: the same state, input and generator give the same
picks. `select` is the one way to call it: it keeps broken candidates out, whatever the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor

from slap_ds.device import to_device

Signal = Literal["loss", "sketch", "el2n", "nuclear", "hidden", "validation"]


@dataclass(frozen=True)
class Course:
    """What is known of a run before its first step."""

    ids: Tensor  # (n,) int64, the sample ids of all training data
    steps: int
    candidates: int  # N of a step


@dataclass(frozen=True)
class ScoredBatch:
    """What a selector sees of N candidates. Means are over a sample's response tokens."""

    loss: Tensor  # (N,) float32, nats per response token
    sketch: Tensor | None = None  # (N, D) float32 or bfloat16
    el2n: Tensor | None = None  # (N,) float32, mean L2 norm of softmax - onehot
    nuclear: Tensor | None = None  # (N,) float32, nuclear norm of the response tokens' logits
    hidden: Tensor | None = None  # (N, E) float32, mean final hidden state
    ids: Tensor | None = None  # (N,) int64, sample ids
    tokens: Tensor | None = None  # (N,) int64, of prompt and answers: what training it costs
    response_tokens: Tensor | None = None  # (N,) int64, > 0: how many terms of the loss it has
    groups: Tensor | None = None  # (N,) int64 in [0, G): candidates that share a quota
    quotas: Tensor | None = None  # (G,) int64: most picks of a group
    validation: Tensor | None = None  # (D,) float32, mean sketch of validation samples
    finite: Tensor | None = None  # (N,) bool on the CPU: what `usable` says, where it is known
    step: int = 0
    lr: float = 0.0  # learning rate of the step

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, index: Tensor) -> ScoredBatch:
        """The candidates at `index` (n,), in that order; quotas stay."""
        rows: dict[str, Any] = self.by_candidate()
        return replace(self, **{name: x[to_device(index, x.device)] for name, x in rows.items()})

    def by_candidate(self) -> dict[str, Tensor]:
        """What is there with one row a candidate."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        whole = ("quotas", "validation")
        return {k: v for k, v in values.items() if isinstance(v, Tensor) and k not in whole}

    def usable(self) -> Tensor:
        """(N,) bool on the CPU: whose scores are all finite."""
        if self.finite is not None:
            return self.finite
        finite = torch.ones(len(self), dtype=torch.bool)
        for value in self.by_candidate().values():
            finite &= _finite(value).cpu()
        return finite

    def to_host(self) -> ScoredBatch:
        """The same with the numbers that are one a candidate on the CPU, where selectors sort them.

        A GPU is waited for once: they and `finite` travel together. Sketches and hidden states stay
        where they are.
        """
        scores = self.by_candidate()
        each = {k: x for k, x in scores.items() if x.dim() == 1 and x.is_floating_point()}
        finite = torch.stack([_finite(x) for x in scores.values()]).all(0)
        *columns, known = torch.stack([*each.values(), finite.to(self.loss)]).cpu()
        found: dict[str, Any] = dict(zip(each, columns, strict=True))
        return replace(self, finite=known != 0, **found)


def _finite(value: Tensor) -> Tensor:
    """(N, ...) -> (N,) bool, by the ends alone: `isfinite` would copy all sketches."""
    ends = torch.stack(value.reshape(len(value), -1).aminmax(dim=1))
    return torch.isfinite(ends).all(0)


@dataclass(frozen=True)
class Selection:
    """The candidates to train in this step."""

    picks: Tensor  # (M,) int64, positions in the candidate batch, no position twice
    weights: Tensor  # (M,) float32, each pick's weight in the loss
    stats: dict[str, Any] = field(default_factory=dict)  # for metrics.jsonl


class Selector(Protocol):
    """One selection method. `needs` says what the scorer has to compute for it."""

    needs: frozenset[Signal]
    takes_quotas: bool  # whether `select` honours the batch's groups and quotas
    own_count: bool  # whether `select` may pick more or fewer than its budget
    unit_sketches: bool  # whether sketches of unit length suit it, unless the user says otherwise
    remembers_until: float  # share of the run in which steps that train all are scored too

    def begin(self, course: Course) -> None:
        """Told once, before the first step or a resume.

        Raises:
            ValueError: this run cannot be made with this method.
        """
        ...

    def budget(self, step: int, steps: int, candidates: int, keep: float) -> int:
        """M of a step of N candidates, the same on every rank; N: all are trained."""
        ...

    def select(self, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
        """Pick exactly `budget` of the batch's candidates, 1 <= budget <= N.

        Changes no state, for a step may ask several times.
        """
        ...

    def remember(self, batch: ScoredBatch, selection: Selection) -> None:
        """Take in what was chosen in the end; called on every rank after each scored step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Nested mappings of JSON values and tensors; a checkpoint keeps them to the bit."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Stateless:
    """For selectors that remember nothing, and what most selectors share."""

    takes_quotas = False
    own_count = False
    unit_sketches = False
    remembers_until = 0.0

    def begin(self, course: Course) -> None:
        pass

    def budget(self, step: int, steps: int, candidates: int, keep: float) -> int:
        return max(1, round(keep * candidates))

    def remember(self, batch: ScoredBatch, selection: Selection) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state, f"{type(self).__name__} keeps no state, found {sorted(state)}"


def select(selector: Selector, batch: ScoredBatch, budget: int, generator: Generator) -> Selection:
    """Run `selector` on the candidates whose scores are finite.

    NaN or infinite scores come from broken samples (no response token, overflow). Argmax and top-k
    would always pick them, so they are left out here; `stats["nonfinite"]` counts them. When fewer
    than `budget` remain, all of them are picked.

    Raises:
        ValueError: no candidate has finite scores.
    """
    index = batch.usable().nonzero()[:, 0]
    if not len(index):
        raise ValueError(
            f"all {len(batch)} candidates have NaN or infinite scores: the model has diverged "
            "(lower optimizer.lr) or its weights are broken"
        )
    seen = batch if len(index) == len(batch) else batch.take(index)
    kept = selector.select(seen, min(budget, len(index)), generator)
    picks = index[kept.picks.cpu()]
    assert len(picks.unique()) == len(picks), "a selector picked a candidate twice"
    assert selector.own_count or len(picks) == min(budget, len(index)), "not the budget"
    stats = {**kept.stats, "nonfinite": len(batch) - len(index)}
    return Selection(picks, kept.weights.cpu(), stats)


def unweighted(picks: Tensor, **stats: Any) -> Selection:
    """A selection in which every pick weighs 1."""
    return Selection(picks, torch.ones(len(picks), dtype=torch.float32), stats)
