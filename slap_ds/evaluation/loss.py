"""Evaluation loss: nats per response token, over all samples and per task and source."""

from __future__ import annotations

from typing import Any

import numpy as np

from slap_ds.comm import Comm
from slap_ds.data.packing import Candidate, PackedRow, deal, pack
from slap_ds.data.store import TokenStore
from slap_ds.engine import Engine
from slap_ds.scoring import Wants


def evaluate_loss(
    engine: Engine,
    comm: Comm,
    store: TokenStore,
    *,
    step: int,
    row_tokens: int,
    max_samples: int | None = None,
    keep_losses: bool = False,
) -> dict[str, Any]:
    """Token-mean losses of the store's samples on the current weights; all ranks call this.

    Returns: {"eval_loss": x, "eval_loss_by_task": {name: x}, "eval_loss_by_source": {name: x}},
    nats per response token, the same on every rank. With `keep_losses` also "samples": the `ids`,
    `loss` (nats, summed over response tokens) and `tokens` of each, in the store's order.
    """
    chosen = np.arange(len(store))
    if max_samples is not None and max_samples < len(store):
        generator = np.random.Generator(np.random.Philox(key=[0, len(store)]))
        chosen = np.sort(generator.choice(len(store), max_samples, replace=False))
    mine = chosen[deal(store.lengths[chosen], comm.world)[comm.rank]]
    samples = [Candidate(int(i), store[int(i)].ids, store[int(i)].mask) for i in mine]
    rows = pack(samples, row_tokens)
    most = int(comm.exchange(step, "evaluation rows", [len(rows)]).max())
    rows += [PackedRow.empty()] * (most - len(rows))
    scores = engine.score(rows, Wants())
    position = scores.positions.cpu().numpy()
    loss, tokens = scores.loss.double().cpu().numpy(), scores.tokens.cpu().numpy()

    result: dict[str, Any] = {"eval_loss": _means(comm, step, [loss], [tokens])[0]}
    for label in ("task", "source"):
        codes = getattr(store, label)[position]
        names = store.names[label]
        groups = [codes == code for code in range(len(names))]
        means = _means(comm, step, [loss[g] for g in groups], [tokens[g] for g in groups])
        result[f"eval_loss_by_{label}"] = {
            name: mean for name, mean in zip(names, means, strict=True) if mean is not None
        }
    if keep_losses:
        table = np.zeros((2, len(chosen)))
        table[:, np.searchsorted(chosen, position)] = loss, tokens
        sums = comm.sum(step, "evaluation samples", table.ravel().tolist())
        ids = store.sample_ids[chosen].tolist()
        result["samples"] = {"ids": ids, "loss": sums[: len(ids)], "tokens": sums[len(ids) :]}
    return result


def _means(
    comm: Comm, step: int, losses: list[np.ndarray], tokens: list[np.ndarray]
) -> list[float | None]:
    sums = comm.sum(step, "evaluation sums", [float(x.sum()) for x in (*losses, *tokens)])
    half = len(losses)
    return [s / n if n else None for s, n in zip(sums[:half], sums[half:], strict=True)]
