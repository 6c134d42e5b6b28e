"""One step: plan -> score -> choose -> train.

    plan    the candidates, who scores which, how many are trained        StepPlan
    score   every rank its share, then all scores on every rank           ScoredBatch
    choose  rank 0 picks, all ranks hear of it and check that they agree  Selection
    train   the picks, on the ranks that hold or are dealt them           StepResult

Every rank runs this file in lockstep. Whatever decides the course of a step (candidates, deal,
picks, number of rows) is computed from values that all ranks share, or agreed on through `comm`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from slap_ds import jsonl
from slap_ds.data.batch import CandidateBatch
from slap_ds.data.packing import PackedRow, Positions, deal
from slap_ds.distributed.comm import Comm
from slap_ds.scoring import Scores
from slap_ds.selection import ScoredBatch, Selection, Selector, select, select_balanced
from slap_ds.timing import Stopwatch, start_peak
from slap_ds.train.run import Run
from slap_ds.train.schedule import budget_at, learning_rate

_MOST_SKIPPED = 3  # steps in a row that change nothing, before the run is given up


@dataclass(frozen=True)
class StepPlan:
    """What a step will do, known before anything is computed; the same on every rank."""

    step: int
    batch: CandidateBatch  # all N candidates
    validation: CandidateBatch | None  # what the selector compares them with
    shares: list[Positions]  # by group of ranks: the candidates it scores
    budget: int  # M, how many are trained
    lr: float
    scores: bool  # False: the method looks at no scores, or all are trained
    reuses: bool  # the scoring forward serves as the training forward
    balance: str  # deal, quota or none: how picks are spread over the ranks
    watch: Stopwatch  # started with the step
    sent_before: int  # bytes this rank had put into collectives

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(frozen=True)
class StepResult:
    """A step that has been taken. All but `seconds` and `boundary_bytes` are equal on all ranks."""

    loss: float  # nats per trained token, weighted
    grad_norm: float  # before clipping
    balance: float | None  # mixture of experts: the routers' balance loss, weighted as `loss`
    skipped: bool  # loss or gradients were not finite: the weights are as they were
    broken: list[tuple[int, str]]  # (sample id, reason) of the samples to blame for that
    stop: bool  # some rank was asked to save and leave
    loads: list[float]  # by rank: trained tokens of its group
    lags_s: list[float]  # by rank: seconds for which the others waited for it
    seconds: dict[str, float]  # this rank's, by phase
    boundary_bytes: int  # block inputs that this rank held at once


def plan_step(run: Run, step: int, batch: CandidateBatch | None = None) -> StepPlan:
    """Draw the step's candidates (or take `batch`) and settle what will be done with them."""
    start_peak(run.engine.device)
    watch = Stopwatch(run.engine.device)
    if batch is None:
        batch = CandidateBatch(run.inputs.train, next(run.stream))
    n, steps, selector = len(batch), len(run.stream), run.selector
    budget = budget_at(step, steps, n, run.config.selection, selector)
    remembers = step < selector.remembers_until * steps
    scores = bool(selector.needs) and (budget < n or remembers)
    return StepPlan(
        step=step,
        batch=batch,
        validation=_validation_batch(run, step) if scores else None,
        shares=deal(batch.lengths, run.comm.groups),
        budget=budget,
        lr=learning_rate(step, steps, run.config),
        scores=scores,
        reuses=scores and run.reuses,
        balance=run.balance if scores else "deal",
        watch=watch,
        sent_before=run.comm.bytes_sent,
    )


def score(run: Run, plan: StepPlan) -> ScoredBatch | None:
    """The scores of all candidates, in candidate order; None where nobody looks at them."""
    if not plan.scores:
        return None
    comm, batch = run.comm, plan.batch
    with plan.watch("score"):
        validation = _score_validation(run, plan)
        rows = batch.rows(plan.shares[comm.group], run.config.score_row_tokens)
        rows = equal_rows(comm, plan.step, "scoring rows", rows)
        local = run.engine.score(rows, run.scorer.request(plan.step), keep=plan.reuses)
    with plan.watch("gather"):
        gathered = comm.gather(plan.step, local, len(batch))
        scored = run.scorer.finish(gathered, batch.content, validation)
        ids = torch.from_numpy(batch.sample_ids)
        return replace(scored, ids=ids, step=plan.step, lr=plan.lr)


def choose(run: Run, plan: StepPlan, scored: ScoredBatch | None) -> Selection:
    """The picks and their weights, chosen by rank 0, the same on every rank.

    Raises:
        RankDisagreement: some rank holds others.
    """
    with plan.watch("select"):
        selection = _choose(run, plan, scored) if run.comm.rank == 0 else None
    with plan.watch("scatter"):
        selection = run.comm.broadcast_picks(plan.step, selection)
        if scored is not None:
            run.selector.remember(scored, selection)
        return selection


def train_on(run: Run, plan: StepPlan, selection: Selection) -> StepResult:
    """One optimizer step on the picks.

    Raises:
        ValueError: the third step in a row has no finite loss and gradients.
    """
    comm, batch, step = run.comm, plan.batch, plan.step
    picks = selection.picks.numpy()
    with plan.watch("scatter"):
        mine = _place(plan, picks, comm)
        weights = dict(zip(picks.tolist(), selection.weights.tolist(), strict=True))
        each = [weights[int(p)] for p in mine]
        rows = batch.rows(mine, run.config.batch.micro_batch_tokens, each)
        rows = equal_rows(comm, step, "training rows", rows)
    with plan.watch("train"):
        # Dropout's draws: the step's own, so that resuming needs no generator state.
        torch.manual_seed(step_seed(run.config.seed, step) + comm.rank)
        total_weight = float(batch.response_tokens[picks] @ selection.weights.double().numpy())
        stats = run.engine.train(rows, total_weight, plan.lr, replay=plan.reuses)
    plan.watch.stop("step")
    seconds = {**plan.watch.seconds(), **stats.seconds}
    sums = [stats.loss, stats.balance or 0.0]
    (loss, balance), loads, lags_s, stop = _totals(comm, step, sums, int(batch.lengths[mine].sum()))
    # The engines leave the weights as they were, on all ranks alike.
    skipped = not math.isfinite(loss) or math.isinf(stats.grad_norm)
    run.state.skipped = run.state.skipped + 1 if skipped else 0
    broken = _broken_rows(run, plan, picks, stats.broken) if skipped else []
    return StepResult(
        loss=loss / total_weight,
        grad_norm=stats.grad_norm,
        balance=None if stats.balance is None else balance / total_weight,
        skipped=skipped,
        broken=broken,
        stop=stop,
        loads=loads,
        lags_s=lags_s,
        seconds=seconds,
        boundary_bytes=stats.boundary_bytes,
    )


def equal_rows(comm: Comm, step: int, phase: str, rows: list[PackedRow]) -> list[PackedRow]:
    """`rows`, filled up with empty ones to the largest count of any rank."""
    most = int(comm.exchange(step, phase, [len(rows)]).max())
    return rows + [PackedRow.empty()] * (most - len(rows))


def _validation_batch(run: Run, step: int) -> CandidateBatch | None:
    """`selection.greats.batch` validation samples, others at every step."""
    store = run.inputs.validation
    if store is None or "validation" not in run.selector.needs:
        return None
    count = min(run.config.selection.greats.batch, len(store))
    generator = np.random.Generator(np.random.Philox(key=[run.config.seed, step]))
    return CandidateBatch(store, np.sort(generator.choice(len(store), count, replace=False)))


def _score_validation(run: Run, plan: StepPlan) -> Scores | None:
    """The step's validation samples, where the selector looks at them; before the candidates, whose
    block inputs must be the last that scoring leaves."""
    batch, comm = plan.validation, run.comm
    if batch is None:
        return None
    share = deal(batch.lengths, comm.groups)[comm.group]
    rows = batch.rows(share, run.config.score_row_tokens)
    rows = equal_rows(comm, plan.step, "validation rows", rows)
    local = run.engine.score(rows, run.scorer.request(plan.step).sketch_only())
    return comm.gather(plan.step, local, len(batch))


def _choose(run: Run, plan: StepPlan, scored: ScoredBatch | None) -> Selection:
    n, comm = len(plan), run.comm
    if plan.budget == n and scored is None:
        return Selection(torch.arange(n), torch.ones(n))
    # A selector that needs no scores gets a batch of equal ones.
    seen = replace(
        scored if scored is not None else ScoredBatch(loss=torch.zeros(n)),
        tokens=torch.from_numpy(plan.batch.lengths),
        response_tokens=torch.from_numpy(plan.batch.response_tokens),
    )
    quotas = plan.balance == "quota" and comm.groups > 1
    return pick(
        run.selector,
        seen,
        plan.budget,
        step_seed(run.config.seed, plan.step),
        holder=_holders(plan.shares, n) if quotas else None,
        holders=comm.groups,
        slack=run.config.step.quota_slack,
    )


def pick(
    selector: Selector,
    seen: ScoredBatch,
    budget: int,
    seed: int,
    *,
    holder: torch.Tensor | None,
    holders: int,
    slack: float,
) -> Selection:
    """What `selector` makes of a batch whose `tokens` are known.

    Args:
        holder: (N,) int64 in [0, holders), the rank (or group of ranks) that holds each candidate,
            where picks stay there and none may get more than (1 + slack) times its share; None:
            anyone may.
    """
    generator = torch.Generator().manual_seed(seed)
    if holder is None:
        return select(selector, seen, budget, generator)
    assert seen.tokens is not None
    return select_balanced(
        selector,
        seen,
        budget,
        generator,
        holder=holder,
        tokens=seen.tokens,
        holders=holders,
        slack=slack,
    )


def _holders(shares: list[Positions], n: int) -> torch.Tensor:
    """(N,) int64: the group of ranks that holds each candidate."""
    holder = np.empty(n, dtype=np.int64)
    for group, share in enumerate(shares):
        holder[share] = group
    return torch.from_numpy(holder)


def _place(plan: StepPlan, picks: Positions, comm: Comm) -> Positions:
    """The picks this rank trains: dealt out anew by tokens, or those it holds already."""
    if plan.balance == "deal":
        mine: Positions = picks[deal(plan.batch.lengths[picks], comm.groups)[comm.group]]
        return mine
    return np.intersect1d(picks, plan.shares[comm.group])


def _totals(
    comm: Comm, step: int, sums: list[float], tokens: int
) -> tuple[list[float], list[float], list[float], bool]:
    """`sums` summed over ranks; each rank's trained tokens; the seconds each rank held the
    others up; whether any rank was asked to stop."""
    bits = np.asarray(sums, dtype=np.float64).view(np.int64).tolist()
    waited_us = int(comm.waited_s * 1e6)
    comm.waited_s = 0.0
    frozen_us = int(comm.heart.take_frozen() * 1e6)
    values = [tokens, waited_us, frozen_us, comm.heart.stop, *bits]
    table = comm.exchange(step, "step totals", values)
    whole = np.ascontiguousarray(table[:, 4:]).view(np.float64).sum(0)
    # Whoever waits least for the others is the one they wait for.
    lags = np.maximum(table[:, 1].max() - table[:, 1], table[:, 2]) / 1e6
    loads = table[:, 0].astype(float).tolist()
    return whole.tolist(), loads, lags.tolist(), bool(table[:, 3].any())


def _broken_rows(
    run: Run, plan: StepPlan, picks: Positions, mine: tuple[int, ...]
) -> list[tuple[int, str]]:
    """(sample id, reason) of the samples because of which a step changed nothing.

    Those in rows whose loss is not finite, on any rank; all that were to be trained where only
    gradients are not. All ranks call this.
    """
    sample_ids = plan.batch.sample_ids
    ids = [int(sample_ids[i]) for i in mine]
    told = run.comm.texts(plan.step, "samples without a finite loss", jsonl.dumps(ids))
    known = sorted({number for text in told for number in jsonl.loads(text)})
    reason = "step skipped: the loss of its row is not finite"
    if not known:
        known = sorted(sample_ids[picks].tolist())
        reason = "step skipped: the gradients of the step are not finite"
    if run.state.skipped >= _MOST_SKIPPED:
        raise ValueError(
            f"{run.state.skipped} steps in a row without finite loss and gradients, the last one "
            f"with sample ids {known[:5]}: the model has diverged (lower optimizer.lr) or its "
            "weights are broken"
        )
    return [(number, reason) for number in known]


def step_seed(seed: int, step: int) -> int:
    """A generator seed of its own for every step, so that resuming needs no generator state."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
