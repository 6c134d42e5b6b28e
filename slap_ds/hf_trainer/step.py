"""One optimizer step inside a Trainer: its batches in, batches of the picks out.

    batches of all micro-batches and ranks -> Candidates: who holds what, the same on every rank
    score -> gather -> choose on rank 0 -> the picks, in the micro-batches where they were

All ranks run this in lockstep, as they do their batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slap_ds.config.schema import ScoringConfig, SelectionConfig, StepConfig
from slap_ds.data.collated import samples_of
from slap_ds.data.packing import Candidate, PackedRow, Positions, make_row
from slap_ds.data.samples import content_hash
from slap_ds.distributed.comm import Comm
from slap_ds.engine.hosted import HostedEngine
from slap_ds.scoring import Scorer, ScoringPlan
from slap_ds.selection import Course, ScoredBatch, Selection, make_selector
from slap_ds.train.schedule import budget_at
from slap_ds.train.step import pick, step_seed


@dataclass(frozen=True)
class Settings:
    """What a run file says under the same names."""

    selection: SelectionConfig
    scoring: ScoringConfig
    step: StepConfig
    seed: int


@dataclass(frozen=True)
class Candidates:
    """All N candidates of a step, ordered by micro-batch, rank and place: as the data came."""

    mine: list[list[Candidate]]  # this rank's by micro-batch, positions among the N
    holder: torch.Tensor  # (N,) int64, rank
    lengths: Positions  # (N,) tokens
    response_tokens: Positions  # (N,) trained tokens
    content: torch.Tensor  # (N,) int64, equal for equal samples

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class Chosen:
    """What one step will train; all but `rows` is the same on every rank."""

    step: int
    selection: Selection
    scored: ScoredBatch | None
    sample_ids: torch.Tensor  # (M,) int64, of the picks: a hash of tokens and mask
    total_weight: float  # sum of weights over the trained tokens of all picks
    candidates: int  # N
    rows: list[PackedRow]  # one a micro-batch of this rank


class Chooser:
    """The state of selection over a run: scorer and selector."""

    def __init__(self, settings: Settings, engine: HostedEngine, comm: Comm, steps: int) -> None:
        self.settings, self.engine, self.comm, self.steps = settings, engine, comm, steps
        self.selector = make_selector(settings.selection.model_dump())
        self.selector.begin(Course(torch.zeros(0, dtype=torch.int64), steps, 0))
        scoring = settings.scoring.resolved(self.selector.unit_sketches)
        self.scorer = Scorer(ScoringPlan(scoring, self.selector.needs, settings.seed))

    def choose(self, step: int, batches: Sequence[Mapping[str, Any]], lr: float) -> Chosen:
        """Score the candidates in `batches` and settle what is trained; all ranks call this."""
        comm, settings, selector = self.comm, self.settings, self.selector
        found = share(comm, step, [samples_of(batch) for batch in batches])
        n = len(found)
        budget = budget_at(step, self.steps, n, settings.selection, selector)
        remembers = step < selector.remembers_until * self.steps
        scored = None
        reuses = False
        if selector.needs and (budget < n or remembers):
            reuses = self.engine.can_reuse and settings.step.forward != "separate"
            scored = self._score(step, found, lr, reuses)
        selection = self._pick(step, found, scored, budget) if comm.rank == 0 else None
        selection = comm.broadcast_picks(step, selection)
        if scored is not None:
            selector.remember(scored, selection)
        picks = selection.picks.numpy()
        weight_of = dict(zip(picks.tolist(), selection.weights.tolist(), strict=True))
        rows = [_row(samples, weight_of) for samples in found.mine]
        if reuses:
            self.engine.start_replay(rows)
        return Chosen(
            step=step,
            selection=selection,
            scored=scored,
            sample_ids=found.content[selection.picks],
            total_weight=float(found.response_tokens[picks] @ selection.weights.double().numpy()),
            candidates=n,
            rows=rows,
        )

    def _score(self, step: int, found: Candidates, lr: float, keep: bool) -> ScoredBatch:
        rows = [make_row(samples) if samples else PackedRow.empty() for samples in found.mine]
        local = self.engine.score(rows, self.scorer.request(step), keep=keep)
        gathered = self.comm.gather(step, local, len(found))
        scored = self.scorer.finish(gathered, found.content)
        return replace(scored, ids=found.content, step=step, lr=lr)

    def _pick(
        self, step: int, found: Candidates, scored: ScoredBatch | None, budget: int
    ) -> Selection:
        n, balance = len(found), self.settings.step.balance
        if budget == n and scored is None:
            return Selection(torch.arange(n), torch.ones(n))
        seen = replace(
            scored if scored is not None else ScoredBatch(loss=torch.zeros(n), ids=found.content),
            tokens=torch.from_numpy(found.lengths),
            response_tokens=torch.from_numpy(found.response_tokens),
        )
        quotas = self.selector.takes_quotas and self.comm.world > 1 and balance != "none"
        return pick(
            self.selector,
            seen,
            budget,
            step_seed(self.settings.seed, step),
            holder=found.holder if quotas else None,
            holders=self.comm.world,
            slack=self.settings.step.quota_slack,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"scorer": self.scorer.state_dict(), "selector": self.selector.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scorer.load_state_dict(state["scorer"])
        self.selector.load_state_dict(state["selector"])


def share(comm: Comm, step: int, batches: list[list[Candidate]]) -> Candidates:
    """Tell all ranks of all candidates, and give each its position.

    Raises:
        ValueError: the ranks have different numbers of micro-batches, or no candidates at all.
    """
    counts = comm.exchange(step, "micro-batches", [len(batches)])[:, 0]
    if (counts != counts[0]).any():
        raise ValueError(
            f"the ranks have {counts.tolist()} micro-batches for one step: give all the same data, "
            "and leave accelerate's even_batches on"
        )
    sizes = comm.exchange(step, "candidates", [len(samples) for samples in batches])  # (P, m)
    if not sizes.sum():
        raise ValueError("no sample of the step has a trained token: labels are all -100")
    most = int(sizes.sum(1).max())
    facts = np.zeros((most, 3), dtype=np.int64)
    contents = [_facts(sample) for samples in batches for sample in samples]
    facts[: len(contents)] = contents or np.zeros((0, 3))
    table = comm.exchange(step, "lengths", facts.ravel().tolist()).reshape(comm.world, most, 3)
    # Where each micro-batch of each rank begins in the order (micro-batch, rank).
    flat = sizes.T.ravel()
    starts = (np.cumsum(flat) - flat).reshape(sizes.T.shape)  # (m, P)
    order = [
        (rank, int(sizes[rank, :micro].sum()) + place)
        for micro in range(sizes.shape[1])
        for rank in range(comm.world)
        for place in range(int(sizes[rank, micro]))
    ]
    ranks, places = np.array(order, dtype=np.int64).T
    every: npt.NDArray[np.int64] = table[ranks, places]
    mine = [
        [replace(s, position=int(starts[micro, comm.rank]) + i) for i, s in enumerate(samples)]
        for micro, samples in enumerate(batches)
    ]
    return Candidates(
        mine=mine,
        holder=torch.from_numpy(ranks.copy()),
        lengths=every[:, 0].copy(),
        response_tokens=every[:, 1].copy(),
        content=torch.from_numpy(every[:, 2].copy()),
    )


def _facts(sample: Candidate) -> tuple[int, int, int]:
    content = content_hash(sample.ids, sample.mask.astype("u1").tobytes())
    return len(sample.ids), int(sample.mask[1:].sum()), content


def _row(samples: list[Candidate], weight_of: Mapping[int, float]) -> PackedRow:
    """The picks of a micro-batch; the row without samples where there are none."""
    picked = [
        replace(sample, weight=weight_of[sample.position])
        for sample in samples
        if sample.position in weight_of
    ]
    return make_row(picked) if picked else PackedRow.empty()
