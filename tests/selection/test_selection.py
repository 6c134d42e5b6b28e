"""Strata, budgets and selectors against brute force and by frequency."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_ds.selection import ScoredBatch, make_selector, select
from slap_ds.selection.slap import Slap
from slap_ds.selection.strata import assign_strata, expected_budgets, sampled_budgets

losses = st.lists(st.floats(0, 12, width=32), min_size=1, max_size=40).map(torch.tensor)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_batch(n=40, d=6, seed=0):
    g = generator(seed)
    return ScoredBatch(torch.rand(n, generator=g) * 5, torch.randn(n, d, generator=g))


@given(loss=losses, k=st.integers(1, 9))
def test_quantile_strata_are_equal_and_ordered(loss, k):
    strata = assign_strata(loss, k, "quantile")
    sizes = torch.bincount(strata, minlength=k)
    assert sizes.max() - sizes[sizes > 0].min() <= 1 or len(loss) < k
    for low, high in itertools.pairwise(range(k)):
        if (strata == low).any() and (strata == high).any():
            assert loss[strata == low].max() <= loss[strata == high].min()


@given(loss=losses, k=st.integers(1, 9))
def test_width_strata_are_the_histogram(loss, k):
    strata = assign_strata(loss, k, "width")
    low, high = float(loss.min()), float(loss.max())
    for value, stratum in zip(loss.tolist(), strata.tolist(), strict=True):
        width = (high - low) / k
        assert low + stratum * width - 1e-5 <= value <= low + (stratum + 1) * width + 1e-5


@settings(max_examples=200)
@given(loss=losses, k=st.integers(1, 6), share=st.floats(0.01, 1), data=st.data())
def test_budgets_sum_up_and_fit(loss, k, share, data):
    budget = max(1, round(share * len(loss)))
    by = data.draw(st.sampled_from(["quantile", "width"]))
    strata = assign_strata(loss, k, by)
    size = torch.bincount(strata, minlength=k)
    for budgets in (
        sampled_budgets(loss, strata, k, budget, 1.0, generator()),
        expected_budgets(loss, strata, k, budget, 1.0),
    ):
        assert int(budgets.sum()) == budget
        assert (budgets <= size).all()
        assert (budgets >= 0).all()


def test_sampled_budgets_follow_successive_softmax_draws():
    """P(set) of a draw without replacement, written out for 4 candidates and M = 2."""
    loss = torch.tensor([0.0, 1.0, 1.5, 3.0])
    strata = torch.tensor([0, 0, 1, 1])
    p = torch.softmax(loss.double(), 0).tolist()
    expected = [0.0, 0.0, 0.0]  # picks in stratum 1: 0, 1, 2
    for i, j in itertools.permutations(range(4), 2):
        expected[(i > 1) + (j > 1)] += p[i] * p[j] / (1 - p[i])
    g = generator(3)
    counts = [0, 0, 0]
    for _ in range(4000):
        counts[int(sampled_budgets(loss, strata, 2, 2, 1.0, g)[1])] += 1
    for count, share in zip(counts, expected, strict=True):
        assert abs(count / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000) + 1e-3


def test_expected_budgets_by_hand():
    # Softmax shares 1/2, 1/4, 1/4 of M = 5 over strata of 1, 4, 3: stratum 0 is full after one.
    loss = torch.log(torch.tensor([6.0, 1, 1, 0.5, 0.5, 1, 1, 1]))
    strata = torch.tensor([0, 1, 1, 1, 1, 2, 2, 2])
    assert expected_budgets(loss, strata, 3, 5, 1.0).tolist() == [1, 2, 2]
    assert expected_budgets(loss, strata, 3, 8, 1.0).tolist() == [1, 4, 3]


@pytest.mark.parametrize("by", ["quantile", "width"])
@pytest.mark.parametrize("budgets", ["sampled", "expected"])
def test_slap_is_deterministic_and_exact(by, budgets):
    options = {"method": "slap", "slap": {"strata_by": by, "budgets": budgets}}
    batch = make_batch()
    first = select(make_selector(options), batch, 24, generator(7))
    again = select(make_selector(options), batch, 24, generator(7))
    assert first.picks.tolist() == again.picks.tolist()
    assert len(set(first.picks.tolist())) == 24
    assert first.weights.tolist() == again.weights.tolist() == [1.0] * 24


def test_slap_equals_brute_force():
    """SLAP written out in plain Python over the same draws."""
    for seed in range(20):
        batch = make_batch(30, 5, seed)
        selector = make_selector({"method": "slap", "slap": {"budgets": "expected"}})
        found = selector.select(batch, 17, generator(seed)).picks.tolist()
        order = sorted(range(30), key=lambda i: (float(batch.loss[i]), i))
        strata = [[i for rank, i in enumerate(order) if rank * 4 // 30 == k] for k in range(4)]
        ids = torch.empty(30, dtype=torch.int64)
        for k, members in enumerate(strata):
            ids[members] = k
        budgets = expected_budgets(batch.loss, ids, 4, 17, 1.0).tolist()
        picks: list[int] = []
        for k in range(4):
            left = sorted(strata[k])
            for _ in range(budgets[k]):
                if not picks:
                    draw = torch.randint(len(left), (1,), generator=generator(seed))
                    choice = left[int(draw)]
                else:
                    distance = torch.cdist(
                        batch.sketch[left].double(), batch.sketch[picks].double()
                    ).amin(1)
                    choice = left[int(distance.argmax())]
                picks.append(choice)
                left.remove(choice)
        assert found == picks


def test_hard_takes_the_largest_losses():
    batch = ScoredBatch(torch.tensor([1.0, 5, 3, 5, 2]))
    selector = make_selector({"method": "hard"})
    assert selector.select(batch, 3, generator()).picks.tolist() == [1, 3, 2]


def test_random_is_uniform():
    selector = make_selector({"method": "random"})
    counts = torch.zeros(10)
    g = generator(1)
    for _ in range(2000):
        counts[selector.select(ScoredBatch(torch.zeros(10)), 4, g).picks] += 1
    assert (counts / 2000 - 0.4).abs().max() < 0.05


def test_broken_candidates_are_never_picked():
    batch = make_batch(10)
    batch.loss[2] = float("nan")
    batch.loss[3] = float("inf")
    batch.sketch[4, 0] = float("nan")
    for method in ("slap", "hard", "random"):
        chosen = select(make_selector({"method": method, "slap": {}}), batch, 9, generator())
        assert sorted(chosen.picks.tolist()) == [0, 1, 5, 6, 7, 8, 9]
        assert chosen.stats["nonfinite"] == 3
    with pytest.raises(ValueError, match="all 3 candidates"):
        select(
            make_selector({"method": "hard"}),
            ScoredBatch(torch.full((3,), float("nan"))),
            1,
            generator(),
        )


def test_unknown_method_lists_the_known():
    with pytest.raises(
        ValueError, match=r"slapp.*full, grand, greats, hard, infobatch, k_center, "
    ):
        make_selector({"method": "slapp"})


def test_inverse_weights_restore_the_share_of_every_stratum():
    batch = make_batch(64)
    expected = Slap(budgets="expected", reweight="inverse")
    chosen = select(expected, batch, 24, generator())
    strata = assign_strata(batch.loss, 4, "quantile")
    # By hand: 16 of 64 candidates are in each stratum, so each must carry a quarter of the weight.
    carried = torch.zeros(4).index_add_(0, strata[chosen.picks], chosen.weights)
    assert carried.tolist() == pytest.approx([6.0] * 4, rel=1e-6)
    assert len(set(chosen.stats["strata_budgets"])) > 1
    plain = select(Slap(budgets="expected"), batch, 24, generator())
    assert plain.picks.equal(chosen.picks)
    assert plain.weights.eq(1).all()
