"""What holds for every method, whatever its rule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_ds.checkpoint.state import packed
from slap_ds.selection import (
    SELECTORS,
    select,
    select_balanced,
)
from slap_ds.selection.methods.ccs import even_budgets
from tests.selection.test_baselines import generator, make, make_batch


@st.composite
def batches(draw):
    """Scored candidates with ties, twins and a broken one now and then, and quotas."""
    n = draw(st.integers(1, 30))
    seed = draw(st.integers(0, 2**20))
    batch = make_batch(n, seed=seed)
    values = batch.by_candidate()
    if draw(st.booleans()):
        for name in ("loss", "el2n", "nuclear"):
            values[name] = (values[name] * 2).round()
    twin = draw(st.integers(0, n - 1))
    for name, value in values.items():
        if name != "ids":
            value[0] = value[twin]
    if n > 2 and draw(st.booleans()):
        values["loss"][n - 1] = math.nan
    budget = draw(st.integers(1, n))
    groups = torch.randint(0, 3, (n,), generator=generator(seed))
    return make_batch(n, seed=seed, **values), budget, groups


@pytest.mark.parametrize("method", sorted(SELECTORS))
@settings(max_examples=20, deadline=None)
@given(drawn=batches())
def test_what_every_method_holds(method, reference, drawn):
    batch, budget, groups = drawn
    n, usable = len(batch), batch.usable()
    selector = make(method, reference)
    before = packed(selector.state_dict())
    found = select(selector, batch, budget, generator(7))
    picks = found.picks.tolist()
    m = min(budget, int(usable.sum()))
    assert len(set(picks)) == len(picks) == len(found.weights)
    assert usable[found.picks].all()
    assert (found.weights > 0).all()
    assert found.weights.dtype == torch.float32
    if not selector.own_count:
        assert len(picks) == m
    if method == "adacore":
        assert float(found.weights.sum()) == int(usable.sum())
    elif method not in ("infobatch", "sampled"):
        assert found.weights.tolist() == [1.0] * len(picks)
    again = select(selector, batch, budget, generator(7))
    assert (again.picks.tolist(), again.weights.tolist()) == (picks, found.weights.tolist())
    assert packed(selector.state_dict()) == before  # selecting changes no state
    if not selector.takes_quotas:
        return
    # Quotas that just hold the budget, each at least 1: it is met, and no group gives more.
    size = torch.bincount(groups[usable], minlength=3)
    quotas = even_budgets(size, m).clamp(min=1)
    limited = make_batch(
        n, **batch.by_candidate(), groups=groups, quotas=quotas, validation=batch.validation
    )
    inside = select(selector, limited, m, generator(7)).picks
    assert len(set(inside.tolist())) == m
    assert (torch.bincount(groups[inside], minlength=3) <= quotas).all()
    wide = make_batch(
        n, **batch.by_candidate(), groups=groups, quotas=size, validation=batch.validation
    )
    assert select(selector, wide, m, generator(7)).picks.tolist() == picks
    levelled = select_balanced(
        selector, batch, m, generator(7),
        holder=groups, tokens=torch.arange(n) % 5 + 1, holders=3, slack=0.02,
    )  # fmt: skip
    assert len(set(levelled.picks.tolist())) == m


RULES = ["hard", "easy", "el2n", "grand", "rho_loss", "moderate", "divbs", "greats", "uds"]


@pytest.mark.parametrize("method", RULES)
def test_rules_without_chance_do_not_see_the_order(method, reference):
    """The same candidates in another order: the same sample ids are picked."""
    for seed in range(5):
        batch = make_batch(seed=seed)
        order = torch.randperm(24, generator=generator(seed))
        selector = make(method, reference)
        first = select(selector, batch, 10, generator(1)).picks
        other = select(selector, batch.take(order), 10, generator(2)).picks
        assert set(batch.ids[first].tolist()) == set(batch.ids[order[other]].tolist())
