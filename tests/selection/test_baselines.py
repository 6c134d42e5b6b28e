"""The methods to compare with: each against its formula written out, and what all must hold."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_ds.checkpoint.state import packed
from slap_ds.config.schema import SelectionConfig
from slap_ds.selection import (
    Course,
    ScoredBatch,
    make_selector,
    select,
)
from slap_ds.selection.methods.ccs import even_budgets
from tests.selection.conftest import BIG


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_batch(n=24, d=6, seed=0, **changes):
    g = generator(seed)
    fields = {
        "loss": torch.rand(n, generator=g) * 5,
        "sketch": torch.randn(n, d, generator=g),
        "el2n": torch.rand(n, generator=g),
        "nuclear": torch.rand(n, generator=g) * 40,
        "hidden": torch.randn(n, 4, generator=g),
        "validation": torch.randn(d, generator=g),
        "ids": torch.arange(n) + BIG,
        "tokens": torch.arange(n) % 7 + 9,
        "response_tokens": torch.arange(n) % 5 + 1,
        "step": 3,
        "lr": 0.1,
    }
    return ScoredBatch(**{**fields, **changes})


def make(method, reference=None, keep=0.5, steps=40, samples=80, candidates=20, **changes):
    """A selector that has begun a run of `steps` * `candidates` / `samples` epochs."""
    options = SelectionConfig().model_dump() | {"method": method, "keep": keep}
    options["reference_losses"] = None if reference is None else str(reference)
    options["validation"] = ["samples.jsonl"]
    for section, fields in changes.items():
        options[section] = options[section] | fields
    selector = make_selector(options)
    selector.begin(Course(torch.arange(samples) + BIG, steps, candidates))
    return selector


def largest(score, m):
    return sorted(range(len(score)), key=lambda i: (-float(score[i]), i))[:m]


EXTREMES = {
    "hard": lambda b, r: b.loss,
    "easy": lambda b, r: -b.loss,
    "el2n": lambda b, r: b.el2n,
    "grand": lambda b, r: b.sketch.double().square().sum(1),
    "rho_loss": lambda b, r: b.loss.double() - torch.tensor([r[int(i)] for i in b.ids]),
    "uds": lambda b, r: b.nuclear,  # nothing has been picked yet
}


@pytest.mark.parametrize("method", EXTREMES)
def test_the_extremes_of_a_score_ties_by_position(method, reference):
    table = {r["id"]: r["loss"] for r in map(json.loads, reference.open())}
    for seed in range(5):
        batch = make_batch(seed=seed)
        for row in batch.by_candidate().values():
            if row is not batch.ids:
                row[13] = row[5]
        ids = batch.ids.flip(0).clone()
        ids[13] = ids[5]
        batch = make_batch(**{**batch.by_candidate(), "ids": ids})
        expected = largest(EXTREMES[method](batch, table), 11)
        assert select(make(method, reference), batch, 11, generator()).picks.tolist() == expected


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.data())
def test_ccs_budgets_follow_the_published_loop(size, data):
    budget = data.draw(st.integers(0, sum(size)))
    rest, expected = budget, [0] * len(size)
    for visited, k in enumerate(sorted(range(len(size)), key=lambda k: (size[k], k))):
        expected[k] = min(size[k], rest // (len(size) - visited))
        rest -= expected[k]
    found = even_budgets(torch.tensor(size), budget).tolist()
    assert found == expected
    assert sum(found) == budget


def test_ccs_by_hand():
    """Losses 0..9 and 100: beta drops 100; strata [0, 3), [3, 6), [6, 9], of 3, 3 and 4."""
    batch = make_batch(11, loss=torch.tensor([100.0, *range(10)]))
    counts = torch.zeros(11)
    for seed in range(300):
        found = select(make("ccs", ccs={"beta": 0.1, "strata": 3}), batch, 7, generator(seed))
        assert found.stats["strata_budgets"] == [2, 2, 3]
        assert 0 not in found.picks.tolist()
        counts[found.picks] += 1
    expected = torch.tensor([0] + [2 / 3] * 6 + [3 / 4] * 4)
    assert (counts / 300 - expected).abs().max() < 0.12
    # beta never eats into the budget, and equal losses are one stratum.
    selector = make("ccs", ccs={"beta": 0.9, "strata": 50})
    assert sorted(select(selector, batch, 10, generator()).picks.tolist()) == [*range(1, 11)]
    same = make_batch(11, loss=torch.ones(11))
    assert len(set(select(selector, same, 4, generator()).picks.tolist())) == 4


@pytest.mark.parametrize("n", [7, 8])
def test_moderate_keeps_the_central_band(n):
    for seed, m in itertools.product(range(4), range(1, n + 1)):
        batch = make_batch(n, seed=seed)
        x = batch.sketch.double().numpy()
        by_distance = np.argsort(np.linalg.norm(x - np.median(x, axis=0), axis=1), kind="stable")
        start = (n - m) // 2
        expected = sorted(by_distance[start : start + m].tolist())
        found = select(make("moderate"), batch, m, generator()).picks.tolist()
        assert sorted(found) == expected


def test_selective_backprop_draws_by_successive_percentiles():
    """P(set) for N = 4 and M = 2, p = ((rank + 1/2) / N)^(1 / keep - 1), written out."""
    batch = make_batch(4, loss=torch.tensor([2.0, 0.5, 9.0, 1.0]))
    rank = [2, 0, 3, 1]
    p = [((r + 0.5) / 4) ** (1 / 0.25 - 1) for r in rank]
    p = [x / sum(p) for x in p]
    expected: dict[frozenset, float] = {}
    for i, j in itertools.permutations(range(4), 2):
        key = frozenset((i, j))
        expected[key] = expected.get(key, 0) + p[i] * p[j] / (1 - p[i])
    selector, g = make("selective_backprop", keep=0.25), generator(5)
    counts = dict.fromkeys(expected, 0)
    for _ in range(3000):
        counts[frozenset(select(selector, batch, 2, g).picks.tolist())] += 1
    for key, share in expected.items():
        assert abs(counts[key] / 3000 - share) < 4 * math.sqrt(share * (1 - share) / 3000) + 1e-3


def test_selective_backprop_schedules():
    def budgets(**options):
        selector = make("selective_backprop", selective_backprop=options)
        return [selector.budget(step, 20, 16, 0.5) for step in range(20)]

    assert budgets() == [8] * 20
    expected = [16] * 10 + [8, 16] * 4 + [16] * 2  # 0.5 to 0.9, every second step whole
    assert budgets(schedule="published") == expected
    assert budgets(schedule="published", interrupt=0) == [16] * 10 + [8] * 8 + [16] * 2


@pytest.mark.parametrize("seed", range(5))
def test_greats_equals_the_second_order_change_of_the_validation_loss(seed):
    """Each pick raises eta sum <g, v> - eta^2 sum_{i < j} <g_i, g_j> most, searched outright."""
    batch, eta = make_batch(9, seed=seed), 0.1
    g, v = batch.sketch.double(), batch.validation.double()

    def gain(chosen):
        pairs = sum(float(g[i] @ g[j]) for i, j in itertools.combinations(chosen, 2))
        return eta * sum(float(g[i] @ v) for i in chosen) - eta**2 * pairs

    found = select(make("greats"), batch, 6, generator()).picks.tolist()
    for m in range(6):
        rest = [i for i in range(9) if i not in found[:m]]
        assert found[m] == max(rest, key=lambda i: (gain([*found[:m], i]), -i))
    free = select(make("greats", greats={"eta": 0.0}), batch, 6, generator())
    assert free.picks.tolist() == largest(g @ v, 6)


def test_uds_remembers_its_picks_in_a_queue():
    selector = make("uds", uds={"alpha": 0.5, "queue": 9})
    past: list[torch.Tensor] = []
    for seed in range(6):
        batch = make_batch(seed=seed)
        kept = past[-9:]
        score = batch.nuclear.double()
        for x in kept:
            score = score + 0.5 * (batch.hidden - x).double().norm(dim=1) / len(kept)
        found = select(selector, batch, 5, generator())
        assert found.picks.tolist() == largest(score, 5)
        selector.remember(batch, found)
        past += list(batch.hidden[found.picks])
        again = make("uds", uds={"alpha": 0.5, "queue": 9})
        again.load_state_dict(copy.deepcopy(selector.state_dict()))
        assert torch.equal(again.recent, torch.stack(past[-9:]))
        selector = again


def test_uds_calibrates_alpha_and_projects_wide_states():
    batch = make_batch(hidden=torch.randn(24, 300, generator=generator(4)))
    selector = make("uds", uds={"width": 128})
    selector.remember(batch, select(selector, batch, 5, generator()))
    assert selector.recent.shape == (5, 128)
    distance = torch.cdist(batch.hidden, batch.hidden)
    projected = selector._embed(batch.hidden)
    ratio = (torch.cdist(projected, projected) / distance)[distance > 0.1]
    assert 0.7 < float(ratio.min()) < float(ratio.max()) < 1.3
    alpha = select(selector, batch, 5, generator()).stats["uds_alpha"]
    mean = torch.cdist(projected.double(), selector.recent.double()).mean(1)
    spread = float((alpha * mean).std(correction=0))
    assert math.isclose(spread, float(batch.nuclear.double().std(correction=0)), rel_tol=1e-9)


def infobatch_run(keep, epochs, candidates=20, samples=200, r=None, delta=0.875, seed=0):
    """InfoBatch over shuffled epochs, losses falling with every training of a sample."""
    steps = epochs * samples // candidates
    selector = make(
        "infobatch", keep=keep, steps=steps, samples=samples, candidates=candidates,
        infobatch={"r": r, "delta": delta},
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    hardness = rng.exponential(size=samples) + 0.1
    trained = np.zeros(samples)
    log = []
    for step in range(steps):
        at = step * candidates % samples
        if at == 0:
            order = rng.permutation(samples)
        indices = order[at : at + candidates]
        loss = torch.tensor(hardness[indices] / (1 + trained[indices] / 9)).float()
        batch = ScoredBatch(loss, ids=torch.from_numpy(indices) + BIG, step=step)
        budget = selector.budget(step, steps, candidates, keep)
        found = select(selector, batch, budget, generator(seed * 1000 + step))
        log.append((indices, loss, budget, found, copy.deepcopy(selector.state_dict())))
        selector.remember(batch, found)
        trained[indices[found.picks.numpy()]] += 1
    return selector, log


def test_infobatch_follows_the_paper_over_epochs():
    _, log = infobatch_run(0.7, epochs=8, r=0.4, delta=0.75)
    score = np.full(200, np.nan)
    mean = -np.inf
    dropped = learnt = 0
    for step, (indices, loss, budget, found, _) in enumerate(log):
        if step % 10 == 0 and step:
            mean = np.nanmean(score.astype(np.float64))
        picks = found.picks.numpy()
        below = score[indices] < mean
        if step < 10 or step >= 60:
            assert budget == 20
            below[:] = False
        kept = np.isin(np.arange(20), picks)
        assert kept[~below].all()  # only what is learnt may be dropped
        expected = np.where(below[picks], 1 / (1 - 0.4), 1)
        np.testing.assert_allclose(found.weights.numpy(), expected, rtol=1e-6)
        learnt += below.sum()
        dropped += (~kept).sum()
        score[indices[picks]] = loss.numpy()[picks]
    assert learnt > 300
    assert abs(dropped / learnt - 0.4) < 4 * math.sqrt(0.24 / learnt)


@pytest.mark.parametrize(("keep", "epochs"), [(0.8, 4), (0.7, 10), (0.9, 3)])
def test_infobatch_trains_keep_of_all_candidates_and_stays_unbiased(keep, epochs):
    picked = weight = total = 0.0
    for seed in range(8):
        _, log = infobatch_run(keep, epochs, seed=seed)
        picked += sum(len(found.picks) for *_, found, _ in log)
        weight += sum(float(found.weights.sum()) for *_, found, _ in log)
        total += 20 * len(log)
    assert abs(picked / total - keep) < 0.01
    assert abs(weight / total - 1) < 0.02


def test_infobatch_resumes_exactly():
    selector, log = infobatch_run(0.8, 4)
    for step in (9, 10, 25):
        indices, loss, budget, found, state = log[step]
        again = make("infobatch", keep=0.8, steps=40, samples=200)
        again.load_state_dict(state)
        batch = ScoredBatch(loss, ids=torch.from_numpy(indices) + BIG, step=step)
        same = select(again, batch, budget, generator(step))
        assert same.picks.tolist() == found.picks.tolist()
        assert same.weights.tolist() == found.weights.tolist()
        again.remember(batch, same)
        assert packed(again.state_dict()) == packed(log[step + 1][-1])
    # 4 bytes a sample, not a number in digits
    assert sum(map(len, packed(selector.state_dict()).values())) < 4 * 200 + 300


def test_infobatch_refuses_a_run_that_cannot_prune_enough():
    with pytest.raises(ValueError, match=r"here 0 of 4 steps: too few to leave out 20%"):
        make("infobatch", keep=0.8, steps=4, samples=80)
    make("infobatch", keep=0.8, steps=4, samples=80, infobatch={"r": 0.5})


def test_rho_loss_tells_what_is_missing(reference, tmp_path):
    with pytest.raises(ValueError, match=r"lacks 50 of the 250 training samples"):
        make("rho_loss", reference, samples=250)
    with pytest.raises(FileNotFoundError, match=r"reference_losses: no file"):
        make("rho_loss", tmp_path / "nothing.jsonl")
    for text, told in {
        '{"id": 1, "loss": 2}\n{"id": 1, "loss": 3}\n': "line 2: sample id 1 stands there twice",
        '{"id": 1.0, "loss": 2}\n': 'line 1: expected {"id"',
        '{"id": 1, "loss": NaN}\n': 'line 1: expected {"id"',
        "[]\n": 'line 1: expected {"id"',
        "oops": "line 1",
        "": "holds no losses",
    }.items():
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ValueError, match=told):
            make("rho_loss", tmp_path / "bad.jsonl")


def test_methods_say_what_they_lack():
    for method, key in {"greats": "validation", "rho_loss": "reference_losses"}.items():
        with pytest.raises(ValueError, match=f"needs selection.{key}"):
            make_selector(SelectionConfig(method=method).model_dump())
