"""Evaluation loss: nats per response token, over all samples and per task and source."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from slap_ds.config.outputs import ANSWERS
from slap_ds.data.store import TokenStore
from slap_ds.distributed.comm import Comm
from slap_ds.engine import Engine
from slap_ds.train.score_pass import sum_pass

logger = logging.getLogger(__name__)
# Of a kind; rows may each name a source of their own, and every evaluation would write them all.
MOST_LABELS = 1000
OTHERS = "(others)"


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
    nats per response token, the same on every rank; of many names those with most tokens, the
    others together (`few_labels`). With `keep_losses` also "samples": the `ids`,
    `task`, `source`, `loss` (nats, summed over response tokens) and `tokens` of each, in the
    store's order.
    """
    chosen: npt.NDArray[np.int64] = np.arange(len(store))
    if max_samples is not None and max_samples < len(store):
        generator = np.random.Generator(np.random.Philox(key=[0, len(store)]))
        chosen = np.sort(generator.choice(len(store), max_samples, replace=False))
    loss, tokens = sum_pass(engine, comm, store, chosen, row_tokens, step)

    result: dict[str, Any] = {"eval_loss": float(loss.sum() / tokens.sum())}
    for label in ("task", "source"):
        codes = getattr(store, label)[chosen]
        names, codes = few_labels(label, store.names[label], codes, tokens, say=comm.rank == 0)
        sums, counts = (np.bincount(codes, of_each, len(names)) for of_each in (loss, tokens))
        result[f"eval_loss_by_{label}"] = {
            names[code]: float(sums[code] / counts[code]) for code in np.flatnonzero(counts)
        }
    if keep_losses:
        result["samples"] = {
            "ids": store.sample_ids[chosen].tolist(),
            "task": [store.names["task"][code] for code in store.task[chosen]],
            "source": [store.names["source"][code] for code in store.source[chosen]],
            "loss": loss.tolist(),
            "tokens": tokens.tolist(),
        }
    return result


def value_of(result: Mapping[str, Any], metric: str) -> float:
    """The number that `metric` names in an evaluation's record, such as eval_loss_by_task.qa or
    answers_by_task.qa.f1.

    Raises:
        ValueError: it names none; says which there are.
    """
    known = values_of(result)
    if metric not in known:
        first, *others = known
        raise ValueError(
            f"evaluation.metric is {metric!r}, expected {first} or one of {', '.join(others)}"
        )
    return known[metric]


def values_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Every number in an evaluation's record by its name as a metric."""
    known = {"eval_loss": result["eval_loss"]}
    for group in ("eval_loss_by_task", "eval_loss_by_source"):
        known |= {f"{group}.{name}": value for name, value in result.get(group, {}).items()}
    for task, marks in result.get(ANSWERS, {}).items():
        known |= {f"{ANSWERS}.{task}.{name}": x for name, x in marks.items() if name != "count"}
    return known


def few_labels(
    kind: str,
    names: list[str],
    codes: npt.NDArray[np.integer[Any]],
    weights: npt.NDArray[np.int64],
    *,
    say: bool,
) -> tuple[list[str], npt.NDArray[np.integer[Any]]]:
    """Names and (n,) codes into them as they are, or, of more than MOST_LABELS names that occur,
    the heaviest ones and OTHERS; with `say` a warning tells so, once."""
    total = np.bincount(codes, weights, len(names))
    present = np.flatnonzero(total)
    if len(present) <= MOST_LABELS:
        return names, codes
    if say:
        _warn_once(kind, len(present))
    kept = np.sort(present[np.argsort(-total[present], kind="stable")][:MOST_LABELS])
    new = np.full(len(names), MOST_LABELS)
    new[kept] = np.arange(MOST_LABELS)
    return [*(names[code] for code in kept), OTHERS], new[codes]


@functools.cache
def _warn_once(kind: str, count: int) -> None:
    logger.warning(
        "rows name %d different values of %r: the %d largest are reported, the others together "
        "as %r",
        count,
        kind,
        MOST_LABELS,
        OTHERS,
    )
