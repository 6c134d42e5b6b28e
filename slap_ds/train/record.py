"""What is written about a step: losses, FLOPs, seconds, lags, and the samples left out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from slap_ds.data.batch import CandidateBatch
from slap_ds.data.packing import Positions
from slap_ds.models.causal import block_flops, head_flops
from slap_ds.selection import ScoredBatch, Selection
from slap_ds.timing import peak_gib
from slap_ds.train.run import Run
from slap_ds.train.step import StepPlan, StepResult, choose, plan_step, score, train_on

_SUMMED = ("picked", "trained_tokens", "flops", "step_s", "score_s", "selection_s")


@dataclass(frozen=True)
class StepRecord:
    """A step's lines in metrics.jsonl, picks.jsonl and quarantine.jsonl."""

    metrics: dict[str, Any]
    selection: Selection
    picks: dict[str, Any]
    quarantine: list[dict[str, Any]]


def train_step(run: Run, step: int, batch: CandidateBatch | None = None) -> StepRecord:
    """One step as the loop takes it, for whoever times or compares steps."""
    plan = plan_step(run, step, batch)
    scored = score(run, plan)
    selection = choose(run, plan, scored)
    return step_record(run, plan, scored, selection, train_on(run, plan, selection))


def step_record(
    run: Run,
    plan: StepPlan,
    scored: ScoredBatch | None,
    selection: Selection,
    result: StepResult,
) -> StepRecord:
    """What a step leaves in the run's files; its sums are added to the run's totals."""
    batch, picks = plan.batch, selection.picks.numpy()
    seconds, loads = result.seconds, result.loads
    metrics = {
        "event": "train",
        "step": plan.step,
        "loss": result.loss,
        "lr": plan.lr,
        "grad_norm": result.grad_norm,
        "candidates": len(batch),
        "picked": len(picks),
        "candidate_tokens": int(batch.lengths.sum()),
        "trained_tokens": int(batch.lengths[picks].sum()),
        "response_tokens": int(batch.response_tokens[picks].sum()),
        "busiest_rank_over_mean": max(loads) / (sum(loads) / len(loads)),
        "forward": "reuse" if plan.reuses else "separate" if plan.scores else "train",
        **_flops(run, plan, picks),
        **seconds,
        "selection_s": sum(seconds.get(f"{p}_s", 0) for p in ("gather", "select", "scatter")),
        "bytes_sent": run.comm.bytes_sent - plan.sent_before,
        "boundary_bytes": result.boundary_bytes,
        **_slowest(result.lags_s),
        **selection.stats,
    }
    if result.balance is not None:
        metrics["balance_loss"] = result.balance
    if result.skipped:
        metrics["skipped"] = True
    if scored is not None:
        metrics["candidate_loss"] = float(scored.loss.double().nanmean())
        metrics["picked_loss"] = float(scored.loss[selection.picks].double().nanmean())
        metrics |= loss_spread(scored.loss, selection.picks)
    if (peak := peak_gib(run.engine.device)) is not None:
        metrics["peak_gib"] = peak
    metrics["total"] = _added(run.state.totals, metrics)
    ids, losses = batch.sample_ids[picks].tolist(), {}
    if scored is not None:
        each = scored.loss[selection.picks].tolist()
        losses["losses"] = [loss if math.isfinite(loss) else None for loss in each]
    broken = _broken_scores(batch, scored) + result.broken
    return StepRecord(
        metrics,
        selection,
        {"step": plan.step, "ids": ids, "weights": selection.weights.tolist(), **losses},
        [{"step": plan.step, "id": number, "reason": reason} for number, reason in broken],
    )


def _added(totals: dict[str, float], metrics: dict[str, Any]) -> dict[str, float]:
    """The totals with this step in them; a copy, for `totals` goes on growing."""
    for key in _SUMMED:
        totals[key] = totals.get(key, 0.0) + float(metrics.get(key, 0.0))
    return dict(totals)


def loss_spread(loss: Tensor, picks: Tensor) -> dict[str, list[float]]:
    """What losses a step's picks have among its candidates, in a few numbers.

    `loss` (N,) nats per token, NaN or infinite ones left out; `picks` (M,) positions. Returns the
    minimum, nine deciles and the maximum of candidates and of picks, and the share kept of each
    tenth of the candidates by rank of loss, smallest first (fewer parts below ten candidates).
    """
    values = loss.double().cpu().numpy()
    kept = np.zeros(len(values), dtype=bool)
    kept[picks.cpu().numpy()] = True
    finite = np.isfinite(values)
    values, kept = values[finite], kept[finite]
    if not kept.any():
        return {}
    tenths = np.linspace(0, 1, 11)
    parts = np.array_split(np.argsort(values, kind="stable"), min(10, len(values)))
    return {
        "candidate_loss_deciles": np.quantile(values, tenths).tolist(),
        "picked_loss_deciles": np.quantile(values[kept], tenths).tolist(),
        "kept_by_loss_decile": [float(kept[part].mean()) for part in parts],
    }


def _flops(run: Run, plan: StepPlan, picks: Positions) -> dict[str, float]:
    """Analytic FLOPs of the step over all ranks, scoring apart; those of training all; those that
    the picks' forward and backward need, nothing recomputed."""
    config, parameters, batch = run.inputs.model_config, run.engine.active_parameters, plan.batch
    scoring = 0.0
    if plan.scores:
        method, layers = run.scorer.plan, config.get_text_config().num_hidden_layers
        for scores in (batch, plan.validation):
            if scores is not None:
                blocks = block_flops(config, parameters, scores.lengths.tolist())
                scoring += blocks * (1 + method.block_passes(layers))
                tokens = int(scores.response_tokens.sum())
                chunk = run.engine.model.chunk_tokens
                scoring += method.head_flops(config, tokens, len(scores), chunk)
    # Backward is two forwards, checkpointing recomputes one; with reuse the first is scoring's.
    # Frozen weights have no gradient, which is half of the backward.
    frozen = run.config.model.lora is not None
    passes = 3 + run.config.model.gradient_checkpointing - frozen

    def training(passes: int, samples: Positions) -> float:
        blocks = passes * block_flops(config, parameters, batch.lengths[samples].tolist())
        return blocks + (3 - frozen) * head_flops(config, int(batch.response_tokens[samples].sum()))

    return {
        "flops": scoring + training(passes - plan.reuses, picks),
        "scoring_flops": scoring,
        "full_flops": training(passes, np.arange(len(batch))),
        "model_flops": training(3 - frozen, picks),
    }


def _slowest(lags_s: list[float]) -> dict[str, float]:
    """The rank the others waited for longest, and how long at least, in seconds."""
    if len(lags_s) == 1:
        return {}
    slowest = int(np.argmax(lags_s))
    return {"slowest_rank": slowest, "slowest_lag_s": lags_s[slowest]}


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
