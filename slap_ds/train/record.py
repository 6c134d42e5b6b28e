"""What is written about a step: FLOPs, losses, lags, samples left out."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from slap_ds import jsonl
from slap_ds.data.batch import CandidateBatch
from slap_ds.data.packing import Positions
from slap_ds.distributed.comm import Comm
from slap_ds.models.causal import block_flops, head_flops
from slap_ds.selection import ScoredBatch
from slap_ds.train.run import Run


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
    told = run.comm.texts(step, "samples without a finite loss", jsonl.dumps(ids))
    known = sorted({number for text in told for number in jsonl.loads(text)})
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


def _validation_batch(run: Run, step: int) -> CandidateBatch | None:
    """`selection.greats.batch` validation samples, others at every step."""
    store = run.inputs.validation
    if store is None or "validation" not in run.selector.needs:
        return None
    count = min(run.config.selection.greats.batch, len(store))
    generator = np.random.Generator(np.random.Philox(key=[run.config.seed, step]))
    return CandidateBatch(store, np.sort(generator.choice(len(store), count, replace=False)))
