"""Draws by size: chances against others, picks against exact integrals, sums against truth."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_ds.selection import ScoredBatch, select
from slap_ds.selection.inclusion import chances, systematic
from slap_ds.selection.methods.sampled import Sampled


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_batch(n=24, seed=0):
    g = generator(seed)
    answer = torch.randint(1, 60, (n,), generator=g)
    prompt = torch.randint(1, 90, (n,), generator=g)
    loss = torch.rand(n, generator=g) * 5
    return ScoredBatch(loss, tokens=answer + prompt, response_tokens=answer)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=30),
    share=st.floats(0.05, 0.95),
    least=st.floats(0.001, 0.05),
)
def test_chances_spend_their_share_and_no_others_are_better(sizes, share, least):
    """Moving cost from any candidate to any other makes the variance larger (it is convex)."""
    value, cost = (torch.tensor(x, dtype=torch.float64) for x in zip(*sizes, strict=True))
    p = chances(value, cost, share, least)
    assert float(p @ cost) == pytest.approx(share * float(cost.sum()), rel=1e-9)
    assert p.min() >= least
    assert p.max() <= 1
    variance = (value.square() / p).tolist()
    for i, j in itertools.permutations(range(min(len(sizes), 8)), 2):
        moved = 1e-4 * float(cost.min())
        less, more = float(p[i] - moved / cost[i]), float(p[j] + moved / cost[j])
        if less < least or more > 1:
            continue
        after = float(value[i]) ** 2 / less + float(value[j]) ** 2 / more
        assert after >= (variance[i] + variance[j]) * (1 - 1e-9)


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(0.01, 1), min_size=1, max_size=20), seed=st.integers(0, 999))
def test_systematic_picks_have_their_chances_exactly(values, seed):
    """The share of all starts for which a candidate is picked, from every interval of starts in
    which the picks do not change."""
    p = torch.tensor(values, dtype=torch.float64)
    order = torch.randperm(len(p), generator=generator(seed))
    ends = p[order].cumsum(0)
    edges = sorted({0.0, 1.0, *(ends - ends.floor()).tolist()})
    share = torch.zeros(len(p), dtype=torch.float64)
    for low, high in itertools.pairwise(edges):
        picks = systematic(p, order, (low + high) / 2)
        assert len(set(picks.tolist())) == len(picks)
        if high - low > 1e-9:
            assert abs(len(picks) - float(p.sum())) < 1 + 1e-6
        share[picks] += high - low
    assert torch.allclose(share, p, atol=1e-9)


def test_every_stretch_of_the_order_gets_its_count():
    p = torch.rand(50, generator=generator(1), dtype=torch.float64)
    order = torch.randperm(50, generator=generator(2))
    for step in range(20):
        taken = torch.zeros(50)
        taken[systematic(p, order, step / 20)] = 1
        for low, high in itertools.combinations(range(0, 51, 5), 2):
            stretch = order[low:high]
            assert abs(float(taken[stretch].sum() - p[stretch].sum())) < 1 + 1e-9


@pytest.mark.parametrize("by", ["size", "loss"])
def test_weighted_gradients_add_up_to_those_of_all(by):
    """A softmax classifier, token by token: the mean over draws of the picks' weighted gradient is
    the gradient of the whole batch, to within four standard errors in every coordinate."""
    batch = make_batch(12)
    counts = batch.response_tokens.tolist()
    weight = torch.randn(5, 3, generator=generator(3), dtype=torch.float64)
    gradients = []
    for i, n in enumerate(counts):
        h = torch.randn(n, 3, generator=generator(100 + i), dtype=torch.float64)
        y = torch.randint(0, 5, (n,), generator=generator(200 + i))
        error = torch.softmax(h @ weight.T, 1) - torch.nn.functional.one_hot(y, 5)
        gradients.append((error.T @ h).flatten())
    each = torch.stack(gradients)
    selector, g, draws = Sampled(0.5, by), generator(4), []
    for _ in range(800):
        found = select(selector, batch, 6, g)
        draws.append(found.weights.double() @ each[found.picks])
    drawn = torch.stack(draws)
    error = drawn.std(0) / math.sqrt(len(draws))
    assert ((drawn.mean(0) - each.sum(0)).abs() < 4 * error).all()
    assert error.max() < 0.2 * each.sum(0).norm()  # so that a bias would be seen


@pytest.mark.parametrize("by", ["size", "loss"])
def test_picks_are_as_frequent_as_their_chances_and_cost_their_share(by):
    batch = make_batch(20, seed=5)
    selector, g = Sampled(0.6, by), generator(6)
    p = selector.chances(batch)
    count, spent = torch.zeros(20, dtype=torch.float64), 0.0
    for _ in range(800):
        found = select(selector, batch, 12, g)
        count[found.picks] += 1
        spent += float(batch.tokens[found.picks].sum())
        assert torch.allclose(found.weights, (1 / p[found.picks]).float())
    assert (count / 800 - p).abs().max() < 4 * 0.5 / math.sqrt(800)
    assert spent / 800 == pytest.approx(0.6 * float(batch.tokens.sum()), rel=0.01)


def test_chances_by_hand():
    # sqrt(n / tokens) is 1/2, 1/2 and 1. 40 of 72 tokens are 64 k/2 + 4 k/2 + 4 k for k = 40 / 38:
    # the last one is certain, and 68 k/2 = 36 is left for the others.
    batch = ScoredBatch(
        torch.ones(3), tokens=torch.tensor([64, 4, 4]), response_tokens=torch.tensor([16, 1, 4])
    )
    assert Sampled(40 / 72).chances(batch).tolist() == pytest.approx([9 / 17, 9 / 17, 1])
    batch = ScoredBatch(torch.tensor([1.0, 2.0]), tokens=torch.tensor([9, 9]),
                        response_tokens=torch.tensor([4, 4]))  # fmt: skip
    assert Sampled(0.5, "loss").chances(batch).tolist() == pytest.approx([1 / 3, 2 / 3])


def test_sizes_need_no_scores():
    assert Sampled(0.6).needs == frozenset()
    assert Sampled(0.6, "loss").needs == {"loss"}


def test_a_whole_batch_is_trained_as_it_is():
    found = select(Sampled(0.6), make_batch(8), 8, generator())
    assert found.picks.tolist() == list(range(8))
    assert found.weights.tolist() == [1.0] * 8
