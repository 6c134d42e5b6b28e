"""Bad input, compilation and what is told of the path that runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slap_ds.ops import active_path, farthest_point, native
from slap_ds.ops.plan import check
from tests.ops.test_farthest_point import INF, LIBRARY, PATHS, assert_same, line, make_points

pytestmark = pytest.mark.lane


def _bad(**changes: object) -> dict[str, Any]:
    sound: dict[str, Any] = {
        "features": torch.arange(12.0).reshape(6, 2),
        "budgets": torch.tensor([2, 1]),
        "strata": torch.tensor([0, 0, 0, 1, 1, 1]),
        "first": 0,
    }
    return sound | changes


def _with(value: float) -> Tensor:
    points = torch.zeros(6, 2)
    points[4, 1] = value
    return points


GROUPS = torch.tensor([0, 1, 0, 1, 0, 1])
BAD = {
    "nan": (_bad(features=_with(float("nan"))), r"features: found nan at \[4, 1\]"),
    "inf": (_bad(features=_with(-INF)), r"features: found -inf at \[4, 1\]"),
    "overflow": (_bad(features=_with(3e38)), "features: .*overflow"),
    "overflow of a sum": (_bad(features=torch.eye(6) * 1.4e19), "features: .*overflow"),
    "dtype": (_bad(features=torch.zeros(6, 2).double()), "features: found torch.float64"),
    "half": (_bad(features=torch.zeros(6, 2).half()), "features: found torch.float16"),
    "1-D": (_bad(features=torch.zeros(6)), "features: found shape"),
    "no points": (_bad(features=torch.zeros(0, 2)), "features: found the empty shape"),
    "no dimensions": (_bad(features=torch.zeros(6, 0)), "features: found the empty shape"),
    "strided": (_bad(features=torch.zeros(2, 6).T), "features: found a non-contiguous"),
    "budgets dtype": (_bad(budgets=torch.tensor([2.0, 1.0])), "budgets: found torch.float32"),
    "budgets shape": (_bad(budgets=torch.tensor(3)), "budgets: found shape"),
    "no budgets": (_bad(budgets=torch.tensor([]).long()), "budgets: found none"),
    "negative budget": (_bad(budgets=torch.tensor([2, -1])), "budgets: found -1"),
    "nothing to pick": (_bad(budgets=torch.tensor([0, 0])), "budgets: they sum to 0"),
    "budget too large": (_bad(budgets=torch.tensor([2, 4])), r"budgets\[1\]: found 4.* 3"),
    "strata missing": (_bad(strata=None), "strata: found None with 2 budgets"),
    "strata dtype": (_bad(strata=torch.zeros(6).int()), "strata: found torch.int32"),
    "strata shape": (_bad(strata=torch.zeros(5).long()), r"strata: found shape \(5,\)"),
    "stratum too large": (_bad(strata=torch.tensor([0, 0, 0, 1, 1, 2])), "strata: found the id 2"),
    "stratum negative": (_bad(strata=torch.tensor([0, 0, 0, 1, 1, -1])), "strata: .* id -1"),
    "first too large": (_bad(first=6), "first: found 6"),
    "first negative": (_bad(first=-1), "first: found -1"),
    "first elsewhere": (_bad(first=3), "first: point 3 lies in stratum 1, expected stratum 0"),
    "first after an empty budget": (_bad(budgets=torch.tensor([0, 1])), "expected stratum 1"),
    "groups alone": (_bad(groups=GROUPS), "groups, quotas: found only one"),
    "quotas alone": (_bad(quotas=torch.tensor([9])), "groups, quotas: found only one"),
    "group too large": (_bad(groups=GROUPS, quotas=torch.tensor([9])), "groups: found the id 1"),
    "quota negative": (_bad(groups=GROUPS, quotas=torch.tensor([9, -1])), "quotas: found"),
    "quotas too small": (_bad(groups=GROUPS, quotas=torch.tensor([1, 1])), "quotas: .* 2 picks"),
    "quotas over sizes": (
        _bad(budgets=torch.tensor([3, 3]), groups=GROUPS, quotas=torch.tensor([99, 2])),
        "quotas: .* 5 picks",
    ),
    "first in a full group": (
        _bad(groups=GROUPS, quotas=torch.tensor([0, 9])),
        "first: point 0 lies in group 0, whose quota is 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name: str) -> None:
    request, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        farthest_point(**request)


def test_the_sound_request_of_the_bad_ones_is_accepted() -> None:
    assert farthest_point(**_bad()).picks.tolist() == [0, 2, 5]


OP_ARGS = (torch.randn(20, 6), torch.tensor([5, 4]), torch.arange(20) % 2, 0, True, None, None)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.slap_ds.farthest_point.default, OP_ARGS)
    with_groups = (*OP_ARGS[:4], False, torch.arange(20) % 3, torch.tensor([4, 4, 4]))
    torch.library.opcheck(torch.ops.slap_ds.farthest_point.default, with_groups)


def test_compiles_into_a_full_graph() -> None:
    def pick_rows(features: Tensor, budgets: Tensor, strata: Tensor) -> Tensor:
        result = farthest_point(features * 2.0, budgets, strata, first=0)
        return features[result.picks] + result.pick_distance.isinf()[:, None]

    features, budgets, strata = OP_ARGS[:3]
    compiled = torch.compile(pick_rows, fullgraph=True, backend="aot_eager")
    expected = pick_rows(features, budgets, strata)
    assert torch.equal(compiled(features, budgets, strata), expected)
    fewer = torch.tensor([2, 1])  # another number of picks, the same graph
    assert torch.equal(compiled(features, fewer, strata), pick_rows(features, fewer, strata))


def test_active_path_names_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    name, why = active_path()
    assert name.startswith("cpu: ") if PATHS else name == "pytorch fallback"
    assert why
    monkeypatch.setattr(native, "cpu_library", lambda: "no compiler was found")
    monkeypatch.setattr(native, "cuda_library", lambda: "no nvcc was found")
    why = "no compiler was found; no GPU path: no nvcc was found"
    assert active_path() == ("pytorch fallback", why)
    result = farthest_point(line(0, 1, 2, 3, 10), torch.tensor([3]), first=1)
    assert result.picks.tolist() == [1, 4, 3]


def test_a_library_of_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with pytest.raises(OSError, match="was not built"):
        native.load(tmp_path / "_slap_fps.so")
    if PATHS:
        monkeypatch.setattr(native, "ABI", -1)
        with pytest.raises(OSError, match="expected -1: install slap_ds again"):
            native.load(native.CPU_LIBRARY)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "d", "k", "m"),
    [(65536, 64, 1, 9000), (65536, 1, 256, 30000), (600, 8192, 4, 400), (3000, 512, 256, 2000)],
)
def test_the_largest_shapes(n: int, d: int, k: int, m: int) -> None:
    """Against each other: the reference and PyTorch would take hours."""
    generator = torch.Generator().manual_seed(0)
    points = make_points("normal", n, d, generator)
    strata = torch.arange(n) % k
    budgets = torch.full((k,), m // k)
    plan = check(points, budgets, strata, 0, True, None, None)
    results = [
        native.farthest_point_cpu(LIBRARY, points, plan, path=path)
        for path in PATHS
        if path != "portable"
    ]
    for result in results:
        assert len(result[0].unique()) == plan.picks
        assert_same(result, results[0], (n, d))
