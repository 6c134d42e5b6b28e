"""Evaluation loss: nats per response token, over all samples and per task and source."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from slap_ds.comm import Comm
from slap_ds.data.store import TokenStore
from slap_ds.engine import Engine
from slap_ds.evaluation.pass_ import sum_pass


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
    `task`, `loss` (nats, summed over response tokens) and `tokens` of each, in the store's order.
    """
    chosen: npt.NDArray[np.int64] = np.arange(len(store))
    if max_samples is not None and max_samples < len(store):
        generator = np.random.Generator(np.random.Philox(key=[0, len(store)]))
        chosen = np.sort(generator.choice(len(store), max_samples, replace=False))
    loss, tokens = sum_pass(engine, comm, store, chosen, row_tokens, step)

    result: dict[str, Any] = {"eval_loss": float(loss.sum() / tokens.sum())}
    for label in ("task", "source"):
        codes = getattr(store, label)[chosen]
        result[f"eval_loss_by_{label}"] = {
            name: float(loss[codes == code].sum() / tokens[codes == code].sum())
            for code, name in enumerate(store.names[label])
            if (codes == code).any()
        }
    if keep_losses:
        result["samples"] = {
            "ids": store.sample_ids[chosen].tolist(),
            "task": [store.names["task"][code] for code in store.task[chosen]],
            "loss": loss.tolist(),
            "tokens": tokens.tolist(),
        }
    return result
