"""grand, k_center, divbs and adacore against brute force; quotas, twins and zeros."""

import pytest
import torch

from slap_ds.selection import ScoredBatch, make_selector, select

METHODS = ["adacore", "divbs", "grand", "k_center"]


def make_batch(n=24, d=6, seed=0, **changes):
    g = torch.Generator().manual_seed(seed)
    fields = {"loss": torch.rand(n, generator=g), "sketch": torch.randn(n, d, generator=g)}
    return ScoredBatch(**{**fields, **changes})


def pick(method, batch, budget, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return select(make_selector({"method": method}), batch, budget, generator)


def test_grand_takes_the_longest():
    batch = make_batch()
    batch.sketch[7] = -batch.sketch[3]
    norms = [float(x.double().square().sum()) for x in batch.sketch]
    expected = sorted(range(24), key=lambda i: (-norms[i], i))[:9]
    assert pick("grand", batch, 9).picks.tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_k_center_equals_brute_force(seed):
    batch = make_batch(seed=seed)
    found = pick("k_center", batch, 10, seed).picks.tolist()
    assert found[0] == int(torch.randint(24, (1,), generator=torch.Generator().manual_seed(seed)))
    for m in range(1, 10):
        distance = torch.cdist(batch.sketch.double(), batch.sketch[found[:m]].double()).amin(1)
        assert found[m] == int(distance.argmax())


@pytest.mark.parametrize("seed", range(5))
def test_divbs_equals_projections_solved_anew(seed):
    """Each pick maximises |<g, r>|, r the least-squares residual of the sum on the picks."""
    batch = make_batch(d=12, seed=seed)
    g = batch.sketch.double()
    found = pick("divbs", batch, 9, seed).picks.tolist()
    for m in range(9):
        residual = g.sum(0)
        if m:
            a = g[found[:m]].t()
            residual = residual - a @ torch.linalg.lstsq(a, residual[:, None]).solution[:, 0]
        score = (g @ residual).abs()
        score[found[:m]] = -1
        assert found[m] == int(score.argmax())


def test_divbs_goes_on_when_the_picks_span_the_rest():
    batch = make_batch(n=20, d=3)
    kept = pick("divbs", batch, 11)
    assert len(set(kept.picks.tolist())) == 11
    assert kept.stats["rounds"] == 4
    # The second round is a first round without the first one's picks.
    rest = [i for i in range(20) if i not in kept.picks[:3].tolist()]
    again = pick("divbs", batch.take(torch.tensor(rest)), 3)
    assert [rest[i] for i in again.picks.tolist()] == kept.picks[3:6].tolist()
    zeros = ScoredBatch(torch.zeros(6), torch.zeros(6, 3))
    assert pick("divbs", zeros, 4).picks.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_adacore_equals_plain_greedy(seed):
    batch = make_batch(seed=seed)
    x = batch.sketch.double()
    distance = torch.tensor([[float((a - b).norm()) for b in x] for a in x])
    similar = distance.max() - distance
    found = pick("adacore", batch, 8, seed)
    chosen: list[int] = []
    for index in found.picks.tolist():
        covered = similar[:, chosen].amax(1) if chosen else torch.zeros(24)
        gains = torch.maximum(similar, covered[:, None]).sum(0) - covered.sum()
        gains[chosen] = -1
        assert gains[index] >= gains.max() - 1e-5
        chosen.append(index)
    owner = distance[:, chosen].argmin(1)
    assert found.weights.tolist() == torch.bincount(owner, minlength=8).tolist()


def test_adacore_weights_of_twins():
    batch = make_batch(n=4, d=2)
    batch.sketch[:] = torch.tensor([[0.0, 0], [0, 0], [0, 0], [5, 5]])
    chosen = pick("adacore", batch, 3)
    assert sorted(chosen.picks.tolist()) == [0, 1, 3]
    weights = dict(zip(chosen.picks.tolist(), chosen.weights.tolist(), strict=True))
    assert sum(weights.values()) == 4
    assert weights == {0: 2.0, 1: 1.0, 3: 1.0}


@pytest.mark.parametrize("method", METHODS)
def test_quotas_are_kept(method):
    for seed in range(4):
        groups = torch.arange(24) % 3
        batch = make_batch(seed=seed, groups=groups, quotas=torch.tensor([0, 3, 24]))
        picks = pick(method, batch, 10, seed).picks
        counts = torch.bincount(groups[picks], minlength=3).tolist()
        assert len(picks) == 10
        assert counts[0] == 0
        assert counts[1] <= 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [1, 5, 24])
def test_any_budget_of_broken_and_equal_candidates(method, budget):
    batch = make_batch()
    batch.sketch[4, 2] = float("nan")
    batch.sketch[5:9] = batch.sketch[5].clone()
    picks = pick(method, batch, budget).picks.tolist()
    assert len(set(picks)) == min(budget, 23)
    assert 4 not in picks
    same = ScoredBatch(torch.zeros(7), torch.ones(7, 3))
    assert len(set(pick(method, same, min(budget, 6)).picks.tolist())) == min(budget, 6)
