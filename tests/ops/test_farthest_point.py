"""The farthest-point op against its specification: the same bits on every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from slap_ds.ops import fallback, farthest_point, native, reference
from slap_ds.ops.plan import Plan, check

pytestmark = pytest.mark.lane

LIBRARY = native.cpu_library()
PATHS = [] if isinstance(LIBRARY, str) else native.cpu_paths(LIBRARY)
INF = float("inf")

KINDS = (
    "normal",
    "integers",
    "duplicates",
    "clusters",
    "offset",
    "heavy rows",
    "heavy values",
    "tiny",
    "huge",
    "sparse",
)


def make_points(kind: str, n: int, d: int, generator: torch.Generator) -> Tensor:
    """Inputs that break naive distance formulas, filters and tie rules, (n, d) float32."""
    normal = torch.randn(n, d, generator=generator)
    ids = torch.randint(0, max(1, n // 3), (n,), generator=generator)
    match kind:
        case "integers":
            return normal.round()
        case "duplicates":
            return normal[ids]
        case "clusters":
            return normal[ids] + 1e-4 * torch.randn(n, d, generator=generator)
        case "offset":
            return 30.0 + 0.01 * normal
        case "heavy rows":
            return normal * torch.randn(n, 1, generator=generator).mul(3).exp()
        case "heavy values":
            return normal * torch.randn(n, d, generator=generator).mul(3).exp()
        case "tiny":
            return 1e-21 * normal  # squares are subnormal
        case "huge":
            return 1e16 * normal
        case "sparse":
            return normal * (torch.rand(n, d, generator=generator) < 0.05)
        case _:
            return normal


def make_request(
    seed: int, kind: str, n: int, d: int, k: int, bfloat16: bool, quotas: bool
) -> dict[str, Any]:
    """Arguments of `check` that hold together, budgets of 0 to all of a stratum included."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, size: int) -> Tensor:
        return torch.randint(0, high, (size,), generator=generator)

    features = make_points(kind, n, d, generator)
    strata = integers(k, n)
    sizes = torch.bincount(strata, minlength=k)
    budgets = (torch.rand(k, generator=generator) * (sizes + 1)).long().clamp(max=sizes)
    if int(budgets.sum()) == 0:
        budgets[strata[0]] = 1
    opening = int((budgets > 0).long().argmax())
    members = (strata == opening).nonzero().flatten()
    first = int(members[integers(len(members), 1)])
    request: dict[str, Any] = {
        "features": features.bfloat16() if bfloat16 else features,
        "budgets": budgets,
        "strata": strata,
        "first": first,
        "groups": None,
        "quotas": None,
    }
    if quotas:
        groups = integers(3, n)
        limit = (torch.bincount(groups, minlength=3) * 2 + 2) // 3
        limit[groups[first]] += 1
        while int(torch.minimum(limit, torch.bincount(groups, minlength=3)).sum()) < budgets.sum():
            limit += 1
        request |= {"groups": groups, "quotas": limit}
    return request


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: object) -> None:
    for name, a, b in zip(("picks", "pick_squared", "squared"), found, expected, strict=True):
        assert torch.equal(a, b), f"{what}: {name} differ at {(a != b).nonzero().flatten()[:5]}"


def assert_all_paths(features: Tensor, plan: Plan, expected: tuple[Tensor, ...]) -> None:
    for path in PATHS:
        for threads, block in ((1, 0), (2, 2), (1, 33), (2, 128)):
            found = native.farthest_point_cpu(
                LIBRARY, features, plan, path=path, threads=threads, block=block
            )
            assert_same(found, expected, (path, threads, block))


def as_lists(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else tensor.tolist()


def specified(request: dict[str, Any], across: bool) -> tuple[Tensor, Tensor, Tensor]:
    picks, at, distance = reference.farthest_point(
        request["features"],
        request["budgets"].tolist(),
        as_lists(request["strata"]),
        first=request["first"],
        across_strata=across,
        groups=as_lists(request["groups"]),
        quotas=as_lists(request["quotas"]),
    )
    return torch.tensor(picks), torch.tensor(at), torch.tensor(distance)


@pytest.mark.skipif(not PATHS, reason="the native library is not built")
def test_this_suite_sees_every_path_of_the_processor() -> None:
    assert PATHS[0] == "portable"
    assert native.auto_path(LIBRARY) in PATHS


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 40),
    d=st.sampled_from([1, 2, 3, 5, 8, 16, 17, 31, 32, 40]),
    k=st.integers(1, 5),
    bfloat16=st.booleans(),
    across=st.booleans(),
    quotas=st.booleans(),
)
def test_every_path_gives_the_bits_of_the_reference(
    seed: int, kind: str, n: int, d: int, k: int, bfloat16: bool, across: bool, quotas: bool
) -> None:
    request = make_request(seed, kind, n, d, k, bfloat16, quotas)
    expected = specified(request, across)
    plan = check(**request, across_strata=across)
    assert len(set(expected[0].tolist())) == plan.picks
    picks, at, squared = fallback.farthest_point(request["features"], plan)
    assert_same((picks, at, squared.sqrt()), expected, "fallback")
    assert_same(farthest_point(**request, across_strata=across), expected, "op")
    assert_all_paths(request["features"], plan, (picks, at, squared))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d", "k"), [(700, 64, 1), (500, 130, 3), (150, 2100, 2)])
def test_large_inputs_agree_on_every_path(kind: str, n: int, d: int, k: int) -> None:
    """Large enough for several pools a stratum, the integer filter and its exact second look."""
    request = make_request(1, kind, n, d, k, bfloat16=False, quotas=k > 1)
    plan = check(**request, across_strata=k < 3)
    paths = [path for path in PATHS if path != "portable"]
    expected = fallback.farthest_point(request["features"], plan)
    for i, path in enumerate(paths):
        found = native.farthest_point_cpu(
            LIBRARY, request["features"], plan, path=path, threads=1 + i % 2, block=(0, 48)[i % 2]
        )
        assert_same(found, expected, path)


def test_the_fused_step_rounds_once() -> None:
    """Against exact rational arithmetic, where rounding the product first goes wrong."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(3)
    t = torch.randn(2000, generator=generator).mul(4).exp()
    acc = torch.randn(2000, generator=generator).mul(4).exp()
    # A sum that lies 2^-60 above the middle of two floats: through float64 it would round to even.
    t, acc = torch.cat((t, torch.tensor([2.0**-30]))), torch.cat((acc, torch.tensor([1.0])))
    t[-1], acc[-1] = 1.0 + 2.0**-23, 2.0**25
    fused = reference.square_add(t, acc)
    in_place = fallback._square_add_in_place()
    tried = acc.clone()
    in_place(tried, t)
    assert torch.equal(tried, fused)
    twice = t * t + acc
    assert (twice != fused).sum() > 200
    for x, a, got in zip(t.tolist(), acc.tolist(), fused.tolist(), strict=True):
        exact = Fraction(x) ** 2 + Fraction(a)
        below = torch.nextafter(torch.tensor(got), torch.tensor(0.0)).item()
        above = torch.nextafter(torch.tensor(got), torch.tensor(INF)).item()
        error = abs(exact - Fraction(got))
        assert error <= abs(exact - Fraction(below))
        assert error <= abs(exact - Fraction(above))


def line(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def test_a_line_by_hand() -> None:
    result = farthest_point(line(0, 1, 2, 3, 10), torch.tensor([3]), first=1)
    assert result.picks.tolist() == [1, 4, 3]
    assert result.pick_distance.tolist() == [INF, 81.0, 4.0]  # squared
    assert result.distance.tolist() == [1.0, 0.0, 1.0, 0.0, 0.0]  # roots
    assert [t.dtype for t in result] == [torch.int64, torch.float32, torch.float32]


def test_strata_by_hand() -> None:
    points, strata = line(0, 1, 10, 11, 5), torch.tensor([0, 0, 1, 1, 1])
    budgets = torch.tensor([1, 2])
    across = farthest_point(points, budgets, strata, first=0)
    assert across.picks.tolist() == [0, 3, 4]
    assert across.pick_distance.tolist() == [INF, 121.0, 25.0]
    inside = farthest_point(points, budgets, strata, first=0, across_strata=False)
    assert inside.picks.tolist() == [0, 2, 4]  # a stratum without picks: its lowest index
    assert inside.pick_distance.tolist() == [INF, INF, 25.0]
    assert inside.distance.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]


def test_a_stratum_without_picks_is_at_infinity() -> None:
    result = farthest_point(
        line(0, 1), torch.tensor([1, 0]), torch.tensor([0, 1]), first=0, across_strata=False
    )
    assert result.distance.tolist() == [0.0, INF]


def test_a_full_group_hands_its_budget_to_the_next_stratum() -> None:
    # Stratum 0 asks for 3 but its points are all of group 0, which may give 1; stratum 1 has 2
    # points of group 1 and must fill the rest, the last one from stratum 2.
    points = line(0, 1, 2, 10, 11, 20)
    result = farthest_point(
        points,
        torch.tensor([3, 1, 0]),
        torch.tensor([0, 0, 0, 1, 1, 2]),
        first=0,
        groups=torch.tensor([0, 0, 0, 1, 1, 1]),
        quotas=torch.tensor([1, 3]),
    )
    assert result.picks.tolist() == [0, 4, 3, 5]


def test_a_rest_goes_round_to_the_first_stratum() -> None:
    result = farthest_point(
        line(0, 1, 2, 10, 11),
        torch.tensor([1, 2]),
        torch.tensor([0, 0, 0, 1, 1]),
        first=0,
        groups=torch.tensor([0, 0, 0, 1, 1]),
        quotas=torch.tensor([3, 1]),
    )
    assert result.picks.tolist() == [0, 4, 2]


def test_duplicates_are_never_picked_twice() -> None:
    points = torch.randn(7, 48, generator=torch.Generator().manual_seed(0)).repeat(40, 1)
    result = farthest_point(points, torch.tensor([250]), first=3)
    assert sorted(set(result.picks.tolist())) == sorted(result.picks.tolist())
    assert (result.pick_distance[7:] == 0).all()
    assert result.picks[7:].tolist() == sorted(result.picks[7:].tolist())  # ties: lowest index


def test_every_budget_from_one_to_all() -> None:
    points = torch.randn(65, 33, generator=torch.Generator().manual_seed(0))
    everything = farthest_point(points, torch.tensor([65]), first=9)
    assert sorted(everything.picks.tolist()) == list(range(65))
    assert (everything.distance == 0).all()
    for m in (1, 2, 31, 32, 33, 64):
        some = farthest_point(points, torch.tensor([m]), first=9)
        assert torch.equal(some.picks, everything.picks[:m])


@pytest.mark.skipif(not PATHS, reason="the native library is not built")
def test_the_number_of_threads_changes_nothing() -> None:
    """Passes large enough to be shared out, which those of the small cases are not."""
    points = make_points("clusters", 1500, 256, torch.Generator().manual_seed(0))
    plan = check(points, torch.tensor([700]), None, 5, True, None, None)
    for path in (path for path in PATHS if path != "portable"):
        one = native.farthest_point_cpu(LIBRARY, points, plan, path=path, threads=1)
        for threads in (2, 3, 16):
            many = native.farthest_point_cpu(LIBRARY, points, plan, path=path, threads=threads)
            assert_same(many, one, (path, threads))


def test_many_strata() -> None:
    generator = torch.Generator().manual_seed(0)
    points, strata = torch.randn(600, 8, generator=generator), torch.arange(600) % 256
    budgets = torch.bincount(strata) - 1
    plan = check(points, budgets, strata, 0, True, None, None)
    assert_all_paths(points, plan, fallback.farthest_point(points, plan))


def test_bfloat16_is_widened_exactly() -> None:
    points = torch.randn(90, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    narrow = farthest_point(points, torch.tensor([60]), first=0)
    assert_same(narrow, farthest_point(points.float(), torch.tensor([60]), first=0), "widened")


def test_features_that_want_gradients_are_accepted() -> None:
    points = torch.randn(9, 4, requires_grad=True)
    result = farthest_point(points, torch.tensor([4]), first=0)
    assert not result.distance.requires_grad
