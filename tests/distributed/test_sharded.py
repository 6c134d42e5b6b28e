"""Sharded selection: the picks of one rank that sees everything, bit for bit, on any ranks."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

from slap_ds.config.schema import SelectionConfig
from slap_ds.distributed.comm import Comm
from slap_ds.ops.reference import farthest_point as reference
from slap_ds.selection import ScoredBatch, select, select_balanced
from slap_ds.selection.methods.k_center import KCenter
from slap_ds.selection.sharded import hold
from slap_ds.selection.slap import Slap
from tests.ranks import run_ranks
from tests.recipes import losses, picks, run_config, tiny_config, tiny_model

CASES = 24


@dataclasses.dataclass
class Case:
    """One drawn batch; `first` gives each candidate the first of equal content."""

    selector: object
    batch: ScoredBatch
    first: torch.Tensor
    budget: int
    tokens: torch.Tensor
    quota: bool


def draw(seed):
    """Sizes, dimensions, ties, twins, broken sketches and quotas, all drawn."""
    rng = np.random.default_rng(seed)
    n = int(rng.choice([1, 2, 5, 17, 60, 200, 300]))
    d = int(rng.choice([1, 2, 7, 33]))
    kind = ["normal", "grid", "few points", "equal"][seed % 4]
    if kind == "normal":
        sketch = rng.standard_normal((n, d))
    elif kind == "grid":  # small integers: distances tie all the time
        sketch = rng.integers(-2, 3, (n, d)).astype(float) * -1.0
    elif kind == "few points":
        sketch = rng.standard_normal((3, d))[rng.integers(0, 3, n)]
    else:
        sketch = np.ones((n, d))
    sketch = torch.from_numpy(sketch).float()
    first = torch.arange(n)
    if seed % 3 == 0 and n > 5:
        twins = torch.from_numpy(rng.choice(n, n // 3, replace=False))
        first[twins] = torch.from_numpy(rng.integers(0, n, len(twins)))
        first = torch.minimum(first, torch.arange(n))
        first = first[first]
        first = first[first]
    if seed % 5 == 0 and n > 5:
        sketch[int(rng.integers(n)), 0] = float("nan")
        sketch[int(rng.integers(n)), -1] = float("inf")
    loss = torch.from_numpy(rng.gamma(2.0, 1.0, n)).float()
    if kind == "equal":
        loss[:] = 1.0
    loss = loss[first]
    selectors = [
        Slap(strata=int(rng.integers(1, 6)), budgets="expected"),
        Slap(strata=3, strata_by="width"),
        Slap(strata=4, across_strata=False),
        KCenter(),
    ]
    return Case(
        selector=selectors[int(rng.integers(4))],
        batch=ScoredBatch(loss=loss, sketch=sketch),
        first=first,
        budget=int(rng.integers(1, n + 1)),
        tokens=torch.from_numpy(rng.integers(1, 50, n)),
        quota=bool(rng.integers(2)),
    )


def choose(case, selector, batch, holder, world):
    generator = torch.Generator().manual_seed(5)
    if not case.quota:
        return select(selector, batch, case.budget, generator)
    return select_balanced(
        selector,
        batch,
        case.budget,
        generator,
        holder=holder,
        tokens=case.tokens,
        holders=world,
        slack=0.02,
    )


def sharded_work(seeds):
    comm = Comm(dist.get_rank(), dist.get_world_size())
    out = []
    for seed in seeds:
        case = draw(seed)
        n = len(case.batch)
        # Ranks hold what a drawn deal gives them: one of them perhaps nothing.
        holder = torch.from_numpy(np.random.default_rng(seed).integers(0, comm.world, n))
        whole = case.batch.take(case.first)
        expected = choose(case, case.selector, whole, holder, comm.world)
        mine = (holder == comm.rank).nonzero()[:, 0].flip(0)
        shard = hold(comm, seed, mine, case.batch.sketch[mine], case.first, holder)
        seen = shard.stand_in(ScoredBatch(loss=whole.loss))
        selector = dataclasses.replace(case.selector, farthest=shard.farthest_point)
        got = choose(case, selector, seen, holder, comm.world)
        assert got.picks.tolist() == expected.picks.tolist(), f"seed {seed}: {case}"
        assert torch.equal(got.weights, expected.weights)
        assert got.stats == expected.stats, f"seed {seed}"
        out.append(got.picks.tolist())
    return out


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_picks_of_one_rank(world):
    results = run_ranks(sharded_work, world, range(CASES if world < 4 else CASES // 2))
    assert all(result == results[0] for result in results)
    assert sum(map(len, results[0])) > 300


def distances_work():
    comm = Comm(dist.get_rank(), dist.get_world_size())
    case = draw(4)
    n = len(case.batch)
    holder = torch.arange(n) % comm.world
    mine = (holder == comm.rank).nonzero()[:, 0]
    shard = hold(comm, 0, mine, case.batch.sketch[mine], torch.arange(n), holder)
    features = torch.arange(n, dtype=torch.float32)[:, None]
    points = shard.farthest_point(features, torch.tensor([n // 2]), first=n - 1)
    return points, mine, shard.rounds


def test_distances_are_those_of_the_specification():
    case = draw(4)
    n = len(case.batch)
    picks, at, distance = reference(case.batch.sketch, [n // 2], first=n - 1)
    for points, mine, rounds in run_ranks(distances_work, 2):
        assert points.picks.tolist() == picks
        assert points.pick_distance.tolist() == at
        assert points.distance[mine].tolist() == torch.tensor(distance)[mine].tolist()
        assert int(points.distance.isnan().sum()) == n - len(mine)
        assert rounds <= len(picks)


def test_rounds_are_far_fewer_than_picks():
    """The point of pools: messages go with rounds."""
    g = torch.Generator().manual_seed(0)
    sketch = torch.randn(1500, 32, generator=g)
    shard = hold(Comm(), 0, torch.arange(1500), sketch, torch.arange(1500), torch.zeros(1500))
    features = torch.arange(1500, dtype=torch.float32)[:, None]
    shard.farthest_point(features, torch.tensor([900]), first=0)
    assert shard.rounds < 60


def test_sketches_that_would_overflow_are_refused():
    sketch = torch.full((4, 2), 1e19)
    with pytest.raises(ValueError, match=r"1e\+19: a squared distance could overflow"):
        hold(Comm(), 0, torch.arange(4), sketch, torch.arange(4), torch.zeros(4))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def run_all(configs):
    return [run_config(config) for config in configs]


@pytest.mark.parametrize("world", [2, 4])
def test_a_run_does_not_depend_on_where(world, model, tmp_path):
    """Losses and picks of whole runs, with forward reuse and quotas."""
    configs = {
        where: tiny_config(
            model,
            tmp_path / where,
            steps=3,
            selection={"where": where},
            model={"gradient_checkpointing": True},
            data={"eval": []},
        )
        for where in ("one_rank", "every_rank", "sharded")
    }
    metrics = run_ranks(run_all, world, list(configs.values()))[0]
    found = {
        where: (losses(lines), picks(tmp_path / where))
        for where, lines in zip(configs, metrics, strict=True)
    }
    assert found["one_rank"] == found["every_rank"] == found["sharded"]
    assert all(len(ids) == 10 for ids in found["sharded"][1])


def test_methods_that_look_at_more_than_distances_are_refused():
    with pytest.raises(ValueError, match="found method divbs: choose one_rank or every_rank"):
        SelectionConfig(method="divbs", where="sharded")
