"""One step: score -> gather -> select -> scatter -> train.

Every rank runs this file in lockstep. Whatever decides the course of a step (candidates, deal,
picks, number of rows) is computed from values that all ranks share, or agreed on through `comm`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from slap_ds.data.batch import CandidateBatch
from slap_ds.data.packing import PackedRow, Positions, deal
from slap_ds.distributed.comm import Comm
from slap_ds.scoring import Scores, first_occurrence
from slap_ds.selection import ScoredBatch, Selection, select, select_balanced
from slap_ds.selection.methods.k_center import KCenter
from slap_ds.selection.sharded import Shard, hold
from slap_ds.selection.slap import Slap
from slap_ds.timing import Stopwatch
from slap_ds.train.record import (
    _broken_rows,
    _broken_scores,
    _flops,
    _is_skipped,
    _slowest,
    _totals,
    _validation_batch,
    loss_spread,
)
from slap_ds.train.run import Run
from slap_ds.train.schedule import budget_at, learning_rate


def train_step(run: Run, step: int, batch: CandidateBatch) -> tuple[Selection, dict[str, Any]]:
    """One step: score the candidates, choose, train the picks. Returns the picks and the metrics.

    `batch` is the whole candidate batch; each rank works on its share of it.
    """
    config, comm, engine = run.config, run.comm, run.engine
    watch = Stopwatch(engine.device)
    n = len(batch)
    steps, selector = len(run.stream), run.selector
    budget = budget_at(step, steps, n, config, selector)
    remembers = step < selector.remembers_until * steps
    scoring = bool(selector.needs) and (budget < n or remembers)
    lr = learning_rate(step, steps, config)
    reuse = scoring and run.reuses
    balance = run.balance if scoring else "deal"
    sent_before = comm.bytes_sent
    with watch("step"):
        shares = deal(batch.lengths, comm.world)
        scored, shard = None, None
        if scoring:
            with watch("score"):
                validation = _score_validation(run, step)
                rows = batch.rows(shares[comm.rank], config.score_row_tokens)
                rows = equal_rows(comm, step, "scoring rows", rows)
                local = engine.score(rows, run.scorer.wants(step), keep=reuse)
            with watch("gather"):
                scored, shard = _gather(run, step, batch, local, shares, validation)
                scored = replace(scored, ids=torch.from_numpy(batch.sample_ids), step=step, lr=lr)
        with watch("select"):
            selection = _choose(run, step, batch, budget, scored, shard, shares, balance)
        with watch("scatter"):
            if config.selection.where == "one_rank":
                selection = comm.broadcast_picks(step, selection)
            else:
                assert selection is not None
                comm.agree_picks(step, selection)
            if scored is not None:
                selector.remember(scored, selection)
            picks = selection.picks.numpy()
            mine = _place(batch, picks, shares, balance, comm)
            weights = dict(zip(picks.tolist(), selection.weights.tolist(), strict=True))
            rows = batch.rows(
                mine, config.batch.micro_batch_tokens, [weights[int(p)] for p in mine]
            )
            rows = equal_rows(comm, step, "training rows", rows)
        with watch("train"):
            # Dropout's draws: the step's own, so that resuming needs no generator state.
            torch.manual_seed(_mix(config.seed, step) + comm.rank)
            response = batch.response_tokens[picks]
            total_weight = float(response @ selection.weights.double().numpy())
            stats = engine.train(rows, total_weight, lr, replay=reuse)
    seconds = {**watch.seconds(), **stats.seconds}
    quarantine = _broken_scores(batch, scored)
    loss, loads, lags, stop = _totals(comm, step, stats.loss, int(batch.lengths[mine].sum()))
    record = {
        "event": "train",
        "step": step,
        "loss": loss / total_weight,
        "lr": lr,
        "grad_norm": stats.grad_norm,
        "candidates": n,
        "picked": len(picks),
        "candidate_tokens": int(batch.lengths.sum()),
        "trained_tokens": int(batch.lengths[picks].sum()),
        "response_tokens": int(response.sum()),
        "busiest_rank_over_mean": max(loads) / (sum(loads) / len(loads)),
        "forward": "reuse" if reuse else "separate" if scoring else "train",
        **_flops(run, step, batch, picks, scoring, reuse),
        **seconds,
        "selection_s": sum(seconds.get(f"{p}_s", 0) for p in ("gather", "select", "scatter")),
        "bytes_sent": comm.bytes_sent - sent_before,
        "boundary_bytes": stats.boundary_bytes,
        **_slowest(lags),
        **selection.stats,
    }
    run.skipped = run.skipped + 1 if _is_skipped(loss, stats.grad_norm) else 0
    if run.skipped:
        record["skipped"] = True
        quarantine += _broken_rows(run, step, batch, picks, stats.broken)
    record["quarantine"] = quarantine
    if stop:
        record["stop"] = True
    if scored is not None:
        record["candidate_loss"] = float(scored.loss.double().nanmean())
        record.update(loss_spread(scored.loss, selection.picks))
    if engine.device.type == "cuda":
        record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    for key in ("picked", "trained_tokens", "flops", "step_s", "score_s", "selection_s"):
        run.totals[key] = run.totals.get(key, 0.0) + float(record.get(key, 0.0))
    record["total"] = dict(run.totals)
    return selection, record


def equal_rows(comm: Comm, step: int, phase: str, rows: list[PackedRow]) -> list[PackedRow]:
    """`rows`, filled up with empty ones to the largest count of any rank."""
    most = int(comm.exchange(step, phase, [len(rows)]).max())
    return rows + [PackedRow.empty()] * (most - len(rows))


def _gather(
    run: Run,
    step: int,
    batch: CandidateBatch,
    local: Scores,
    shares: list[Positions],
    validation: Scores | None,
) -> tuple[ScoredBatch, Shard | None]:
    """The scored batch; with sharded selection the sketches stay where they are, in the shard."""
    comm, n = run.comm, len(batch)
    if run.config.selection.where != "sharded" or local.gradient is None:
        return run.scorer.finish(comm.gather(step, local, n), batch.content, validation), None
    rest = comm.gather(step, replace(local, gradient=None), n)
    scored = run.scorer.finish(rest, batch.content)
    sketch = run.scorer.sketch(local)
    assert sketch is not None
    first = first_occurrence(batch.content)
    shard = hold(comm, step, local.positions, sketch, first, _holders(shares, n))
    return shard.stand_in(scored), shard


def _score_validation(run: Run, step: int) -> Scores | None:
    """The step's validation samples, where the selector looks at them; before the candidates, whose
    block inputs must be the last that scoring leaves."""
    batch = _validation_batch(run, step)
    if batch is None:
        return None
    comm = run.comm
    share = deal(batch.lengths, comm.world)[comm.rank]
    rows = batch.rows(share, run.config.score_row_tokens)
    rows = equal_rows(comm, step, "validation rows", rows)
    local = run.engine.score(rows, run.scorer.wants(step).sketch_only())
    return comm.gather(step, local, len(batch))


def _holders(shares: list[Positions], n: int) -> torch.Tensor:
    """(N,) int64: the rank that holds each candidate."""
    holder = np.empty(n, dtype=np.int64)
    for rank, share in enumerate(shares):
        holder[share] = rank
    return torch.from_numpy(holder)


def _choose(
    run: Run,
    step: int,
    batch: CandidateBatch,
    budget: int,
    scored: ScoredBatch | None,
    shard: Shard | None,
    shares: list[Positions],
    balance: str,
) -> Selection | None:
    """The choice; with one_rank None on all ranks but 0, which receive it."""
    n, comm = len(batch), run.comm
    if comm.rank != 0 and run.config.selection.where == "one_rank":
        return None
    if budget == n and scored is None:
        return Selection(torch.arange(n), torch.ones(n))
    generator = torch.Generator().manual_seed(_mix(run.config.seed, step))
    # A selector that needs no scores gets a batch of equal ones.
    seen = scored if scored is not None else ScoredBatch(loss=torch.zeros(n))
    selector = run.selector
    if shard is not None:
        assert isinstance(selector, (Slap, KCenter))
        selector = replace(selector, farthest=shard.farthest_point)
    if balance != "quota" or comm.world == 1:
        return select(selector, seen, budget, generator)
    return select_balanced(
        selector,
        seen,
        budget,
        generator,
        holder=_holders(shares, n),
        tokens=torch.from_numpy(batch.lengths),
        holders=comm.world,
        slack=run.config.step.quota_slack,
    )


def _place(
    batch: CandidateBatch, picks: Positions, shares: list[Positions], balance: str, comm: Comm
) -> Positions:
    """The picks this rank trains: dealt out anew by tokens, or those it holds already."""
    if balance == "deal":
        mine: Positions = picks[deal(batch.lengths[picks], comm.world)[comm.rank]]
        return mine
    return np.intersect1d(picks, shares[comm.rank])


def _mix(seed: int, step: int) -> int:
    """A generator seed of its own for every step, so that resuming needs no generator state."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
