"""Exchanges between ranks: exact, in candidate order, and loud when ranks are out of step."""

import pytest
import torch
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slap_ds.config.schema import ScoringConfig
from slap_ds.data.packing import deal
from slap_ds.distributed.comm import Comm, RankDisagreement
from slap_ds.scoring import HeadScores, Scorer, Scores, ScoringPlan, collect
from slap_ds.selection import Selection
from tests.ranks import run_ranks

N, E = 11, 5


def comm():
    import torch.distributed as dist

    return Comm(dist.get_rank(), dist.get_world_size())


def whole_scores():
    g = torch.Generator().manual_seed(0)
    return Scores(
        positions=torch.arange(N),
        loss=torch.rand(N, generator=g) * 7,
        tokens=torch.randint(1, 2**40, (N,), generator=g),
        gradient=torch.randn(N, E, generator=g),
        diagonal=None,
    )


def local_scores(rank, world, uneven):
    whole = whole_scores()
    lengths = [100 if uneven and i == 0 else 1 + i % 3 for i in range(N)]
    mine = torch.from_numpy(deal(lengths, world)[rank]).flip(0)
    diagonal = torch.full((E,), float(rank + 1))
    return Scores(mine, whole.loss[mine], whole.tokens[mine], whole.gradient[mine], diagonal)


def gather_work(uneven):
    c = comm()
    return c.gather(3, local_scores(c.rank, c.world, uneven), N)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("uneven", [False, True])
def test_gather_is_exact_and_in_order(world, uneven):
    whole = whole_scores()
    for got in run_ranks(gather_work, world, uneven):
        assert got.positions.tolist() == list(range(N))
        assert torch.equal(got.loss, whole.loss)
        assert torch.equal(got.tokens, whole.tokens)
        assert torch.equal(got.gradient, whole.gradient)
        assert got.diagonal.tolist() == [world * (world + 1) / 2] * E


class LargeCopies(TorchDispatchMode):
    """Counts new storages of at least `size` bytes, by the operator that made them."""

    def __init__(self, size):
        super().__init__()
        self.size, self.seen = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if is_tensor(x)
        }
        for made in filter(is_tensor, tree_leaves(out)):
            storage = made.untyped_storage()
            if storage.nbytes() >= self.size and storage.data_ptr() not in given:
                self.seen.append(str(func))
        return out


def test_one_rank_holds_the_sketches_once_and_what_is_made_of_them_once():
    """512 candidates in rows of other orders; 512 * 64 numbers are copied where they are put in
    order, not by the gather, and once more where sums become sketches."""
    n, d = 512, 64
    g = torch.Generator().manual_seed(1)
    order = torch.randperm(n, generator=g)
    whole = torch.randn(n, d, generator=g)
    rows = order.split([100, 0, 212, 200])
    ones, count = torch.ones(d), torch.tensor(9)
    parts = [
        HeadScores(torch.rand(len(row)), torch.full((len(row),), 3), whole[row], ones, count)
        for row in rows
    ]
    config = ScoringConfig(sketch_dim=None, sketch_norm="unit")
    scorer = Scorer(ScoringPlan(config, frozenset({"loss", "sketch"})))
    with LargeCopies(n * d * 4) as copies:
        share = collect(list(rows), parts, scorer.request(0))
        assert len(copies.seen) == 1, copies.seen
        gathered = Comm().gather(0, share, n)
        assert len(copies.seen) == 1, copies.seen
        scored = scorer.finish(gathered, torch.arange(n))
        assert len(copies.seen) == 2, copies.seen
    assert torch.equal(gathered.gradient, whole)
    assert scored.sketch.shape == (n, d)


def picks_work():
    c = comm()
    mine = (
        Selection(torch.tensor([4, 0, 7]), torch.tensor([1.0, 0.5, 2.0])) if c.rank == 0 else None
    )
    return c.broadcast_picks(5, mine)


def test_picks_come_from_one_rank():
    for got in run_ranks(picks_work, 2):
        assert got.picks.tolist() == [4, 0, 7]
        assert got.weights.tolist() == [1.0, 0.5, 2.0]


def out_of_step_work(kind):
    c = comm()
    try:
        if kind == "step":
            c.exchange(7 + (c.rank == 1), "rows", [1])
        elif kind == "phase":
            c.exchange(7, "rows" if c.rank else "picks", [1])
        elif kind == "value":
            c.agree(7, "data", "a" if c.rank != 1 else "b")
        else:
            whole = local_scores(0, 1, False)
            c.gather(7, whole, N)
    except RankDisagreement as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("step", "rank 1 at step 8"),
        ("phase", "skipped or reordered"),
        ("value", r"data differs between rank 0 and ranks \[1\]"),
        ("shares", "22 candidates"),
    ],
)
def test_ranks_out_of_step_are_told_apart(kind, words):
    import re

    told = run_ranks(out_of_step_work, 2, kind)
    assert all(told)
    assert any(re.search(words, text) for text in told)


def sum_work():
    c = comm()
    return c.sum(1, "x", [0.1 * (c.rank + 1), -3.5])


def test_sums_are_the_same_on_every_rank():
    first, second = run_ranks(sum_work, 2)
    assert first == second == [0.1 + 0.2, -7.0]
