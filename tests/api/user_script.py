"""A user's script, as `mypy --strict` sees it; test_types.py checks it."""

from collections.abc import Mapping
from typing import Any

import torch

import slap_ds


class Newest(slap_ds.Stateless):
    needs = frozenset[Any]()

    def select(
        self, batch: slap_ds.ScoredBatch, budget: int, generator: torch.Generator
    ) -> slap_ds.Selection:
        return slap_ds.unweighted(torch.arange(len(batch))[-budget:])


def enough(record: Mapping[str, Any]) -> bool:
    return bool(record["event"] == "train" and record["loss"] < 1.0)


def main(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[slap_ds.TrainResult, int]:
    slap_ds.register_selector("newest", Newest)
    scored: slap_ds.ScoredBatch = slap_ds.score(model, batch)
    chosen: slap_ds.Selection = slap_ds.select(scored, keep=0.5, seed=1)
    others: slap_ds.Selection = slap_ds.select([0.1, 0.2], [[0.0], [1.0]], method="newest")
    points: slap_ds.FarthestPoints = slap_ds.farthest_point(
        torch.zeros(2, 1), torch.tensor([1]), first=0
    )
    callback: slap_ds.Callback = enough
    result: slap_ds.TrainResult = slap_ds.train("my.yaml", callbacks=[callback])
    return result, len(chosen.picks) + len(others.picks) + len(points.picks)
