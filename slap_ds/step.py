"""One step: score -> gather -> select -> scatter -> train.

Every rank runs this file in lockstep. Whatever decides the course of a step (candidates, deal,
picks, number of rows) is computed from values that all ranks share, or agreed on through `comm`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from slap_ds import strict_json
from slap_ds.comm import Comm
from slap_ds.config import Config
from slap_ds.data.batch import CandidateBatch
from slap_ds.data.packing import PackedRow, Positions, deal
from slap_ds.metrics import Stopwatch, loss_spread
from slap_ds.models.causal import block_flops, head_flops
from slap_ds.run import Run, budget_at
from slap_ds.scoring import Scores, first_occurrence
from slap_ds.selection import ScoredBatch, Selection, select, select_balanced
from slap_ds.selection.k_center import KCenter
from slap_ds.selection.sharded import Shard, hold
from slap_ds.selection.slap import Slap


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


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warm-up to the peak, then a cosine down to min_lr_ratio of it at the last step."""
    o = config.optimizer
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    progress = (step - o.warmup_steps) / max(1, steps - 1 - o.warmup_steps)
    share = o.min_lr_ratio + (1 - o.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
    return o.lr * share


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


def _validation_batch(run: Run, step: int) -> CandidateBatch | None:
    """`selection.greats.batch` validation samples, others at every step."""
    store = run.inputs.validation
    if store is None or "validation" not in run.selector.needs:
        return None
    count = min(run.config.selection.greats.batch, len(store))
    generator = np.random.Generator(np.random.Philox(key=[run.config.seed, step]))
    return CandidateBatch(store, np.sort(generator.choice(len(store), count, replace=False)))


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


def _totals(
    comm: Comm, step: int, loss: float, tokens: int
) -> tuple[float, list[float], list[float], bool]:
    """The loss summed over ranks; each rank's trained tokens; the seconds each rank held the
    others up; whether any rank was asked to stop."""
    bits = np.asarray([loss], dtype=np.float64).view(np.int64)
    waited_us = int(comm.waited_s * 1e6)
    comm.waited_s = 0.0
    frozen_us = int(comm.heart.take_frozen() * 1e6)
    values = [int(bits[0]), tokens, waited_us, frozen_us, comm.heart.stop]
    table = comm.exchange(step, "step totals", values)
    losses = np.ascontiguousarray(table[:, 0]).view(np.float64)
    # Whoever waits least for the others is the one they wait for.
    lags = np.maximum(table[:, 2].max() - table[:, 2], table[:, 3]) / 1e6
    loads = table[:, 1].astype(float).tolist()
    return float(losses.sum()), loads, lags.tolist(), bool(table[:, 4].any())


def _slowest(lags: list[float]) -> dict[str, float]:
    """The rank the others waited for longest, and how long at least, in seconds."""
    if len(lags) == 1:
        return {}
    slowest = int(np.argmax(lags))
    return {"slowest_rank": slowest, "slowest_lag_s": lags[slowest]}


def _flops(
    run: Run, step: int, batch: CandidateBatch, picks: Positions, scored: bool, reuse: bool
) -> dict[str, float]:
    """Analytic FLOPs of the step over all ranks, scoring apart; and those of training all."""
    config, parameters = run.inputs.model_config, run.engine.parameters
    scoring = 0.0
    if scored:
        plan, layers = run.scorer.plan, config.get_text_config().num_hidden_layers
        for scores in (batch, _validation_batch(run, step)):
            if scores is not None:
                blocks = block_flops(config, parameters, scores.lengths.tolist())
                scoring += blocks * (1 + plan.block_passes(layers))
                tokens = int(scores.response_tokens.sum())
                scoring += plan.head_flops(config, tokens, len(scores))
    # Backward is two forwards, checkpointing recomputes one; with reuse the first is scoring's.
    # Frozen weights have no gradient, which is half of the backward.
    frozen = run.config.model.lora is not None
    passes = 3 + run.config.model.gradient_checkpointing - frozen

    def training(passes: int, samples: Positions) -> float:
        blocks = passes * block_flops(config, parameters, batch.lengths[samples].tolist())
        return blocks + (3 - frozen) * head_flops(config, int(batch.response_tokens[samples].sum()))

    return {
        "flops": scoring + training(passes - reuse, picks),
        "scoring_flops": scoring,
        "full_flops": training(passes, np.arange(len(batch))),
    }


def _broken_scores(batch: CandidateBatch, scored: ScoredBatch | None) -> list[tuple[int, str]]:
    """(sample id, reason) of the candidates that no selector gets to see."""
    if scored is None:
        return []
    index = (~scored.usable()).nonzero()[:, 0].tolist()
    return [
        (
            int(batch.sample_ids[i]),
            f"not selected: loss {float(scored.loss[i])}, or its sketch is not finite",
        )
        for i in index
    ]


def _is_skipped(loss: float, grad_norm: float) -> bool:
    """Whether the engines left the weights as they were; the same on every rank."""
    return not math.isfinite(loss) or math.isinf(grad_norm)


def _broken_rows(
    run: Run, step: int, batch: CandidateBatch, picks: Positions, mine: tuple[int, ...]
) -> list[tuple[int, str]]:
    """(sample id, reason) of the samples because of which a step changed nothing.

    Those in rows whose loss is not finite, on any rank; all that were to be trained where only
    gradients are not. All ranks call this.

    Raises:
        ValueError: it is the third such step in a row.
    """
    ids = [int(batch.sample_ids[i]) for i in mine]
    told = run.comm.texts(step, "samples without a finite loss", strict_json.dumps(ids))
    known = sorted({number for text in told for number in strict_json.loads(text)})
    reason = "step skipped: the loss of its row is not finite"
    if not known:
        known = sorted(batch.sample_ids[picks].tolist())
        reason = "step skipped: the gradients of the step are not finite"
    if run.skipped >= 3:
        raise ValueError(
            f"{run.skipped} steps in a row without finite loss and gradients, the last one with "
            f"sample ids {known[:5]}: the model has diverged (lower optimizer.lr) or its weights "
            "are broken"
        )
    return [(number, reason) for number in known]
