"""The kernels of `csrc/cuda/` without a GPU: emulated thread by thread, held to the same bits.

What only a GPU can show (races, memory ordering, speed) is in tests/gpu/.
"""

from __future__ import annotations

import ctypes
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slap_ds.ops import fallback, native
from slap_ds.ops.plan import Plan, check
from tests.ops.test_farthest_point import KINDS, assert_same, make_request

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "c++", "clang++")), reason="no C++ compiler"
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("emulated") / "_slap_fps_cuda.so"
    runpy.run_path(str(ROOT / "csrc" / "build.py"))["build_emulation"](target)
    return native.load(target)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "d", "k", "quotas"),
    [
        (1, 1, 1, False),
        (40, 20, 3, True),  # smaller than a pool, rows padded to 16
        (131, 33, 1, False),  # one more than a pool
        (300, 40, 2, True),
    ],
)
def test_emulated_kernels_give_the_bits_of_the_cpu(
    emulated: ctypes.CDLL, n: int, d: int, k: int, quotas: bool, kind: str, across: bool
) -> None:
    bfloat16 = KINDS.index(kind) % 2 == 0
    request = make_request(5, kind, n, d, k, bfloat16, quotas)
    plan = check(**request, across_strata=across)
    expected = fallback.farthest_point(request["features"], plan)
    assert_same(native.farthest_point_cuda(emulated, request["features"], plan), expected, kind)


def test_emulated_kernels_on_more_points_than_threads(emulated: ctypes.CDLL) -> None:
    """Several points a thread in FindPool, many ties at the threshold of the radix selection."""
    points = torch.arange(1300).remainder(9)[:, None].float()
    plan = check(points, torch.tensor([400]), None, 11, True, None, None)
    expected = fallback.farthest_point(points, plan)
    assert_same(native.farthest_point_cuda(emulated, points, plan), expected, "ties")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "across"), [(1, True), (3, False)])
def test_the_filter_changes_no_bit(emulated: ctypes.CDLL, k: int, across: bool, kind: str) -> None:
    """On tensor cores that round as badly as the bound allows; rows of its own, padded to 96."""
    request = make_request(6, kind, 400, 70, k, KINDS.index(kind) % 2 == 1, k > 1)
    plan = check(**request, across_strata=across)
    expected = fallback.farthest_point(request["features"], plan)
    assert_same(native.farthest_point_cuda(emulated, request["features"], plan), expected, kind)


def counts(library: ctypes.CDLL) -> dict[str, int]:
    """What the emulated kernels have done so far: numbers of rounds, of pairs, of loads."""
    library.slap_fps_cuda_counts.restype = ctypes.POINTER(ctypes.c_int64)
    names = ("rounds", "exact rounds", "pairs", "exact pairs", "filtered pairs", "close pairs")
    names += ("loads", "sectors")
    return dict(zip(names, library.slap_fps_cuda_counts()[:8], strict=True))


def added(library: ctypes.CDLL, points: Tensor, plan: Plan) -> dict[str, int]:
    """What one call adds to the counts; it is held to the bits of the CPU besides."""
    before = counts(library)
    found = native.farthest_point_cuda(library, points, plan)
    assert_same(found, fallback.farthest_point(points, plan), "counted")
    return {name: value - before[name] for name, value in counts(library).items()}


def test_the_filter_spares_most_pairs_their_exact_distance(emulated: ctypes.CDLL) -> None:
    """Far from the origin too: points are centred before they are rounded."""
    points = 100.0 + torch.randn(900, 128, generator=torch.Generator().manual_seed(1))
    plan = check(points, torch.tensor([600]), None, 0, True, None, None)
    made = added(emulated, points, plan)
    assert made["exact rounds"] <= 3  # the first, of one pick; the second, which follows from one
    assert made["filtered pairs"] > 0.7 * made["pairs"]
    assert made["close pairs"] < 0.05 * made["filtered pairs"]


def test_the_counts_that_times_are_derived_from_are_those_of_the_kernels(
    emulated: ctypes.CDLL,
) -> None:
    """benchmarks/derive_gpu_op.py follows the kernels in PyTorch; rounding may move a pair."""
    points = torch.randn(900, 128, generator=torch.Generator().manual_seed(5))
    plan = check(points, torch.tensor([630]), None, 0, True, None, None)
    made = added(emulated, points, plan)
    derive = runpy.run_path(str(ROOT / "benchmarks" / "derive_gpu_op.py"))
    found = derive["count_rounds"](points, 630)
    for name in (name.replace("_", " ") for name in derive["COUNTS"]):
        value = made[name]
        limit = 0.03 * value if name == "close pairs" else 0
        assert abs(found[name.replace(" ", "_")] - value) <= limit, (name, made, found)


def test_lanes_look_for_the_pool_side_by_side(emulated: ctypes.CDLL) -> None:
    """A warp's 32 loads of 4 bytes touch 4 sectors, not one each; a stratum need not begin where a
    sector does."""
    n = 8000
    points = torch.randn(n, 2, generator=torch.Generator().manual_seed(6))
    strata = torch.arange(n) // 1600
    plan = check(points, torch.tensor([30] * 5), strata, 0, True, None, None)
    made = added(emulated, points, plan)
    assert made["loads"] >= 2 * 1600 * (made["rounds"] - 1)
    assert made["sectors"] <= 0.2 * made["loads"], made  # 0.125 at best


def test_the_filter_rests_where_it_tells_too_little(emulated: ctypes.CDLL) -> None:
    """Small clusters far apart: what is lost in bfloat16 is larger than the distances inside."""
    generator = torch.Generator().manual_seed(2)
    centres = 1000.0 * torch.randn(3, 64, generator=generator)
    points = centres[torch.arange(900) % 3] + torch.randn(900, 64, generator=generator)
    plan = check(points, torch.tensor([700]), None, 0, True, None, None)
    made = added(emulated, points, plan)
    assert made["exact rounds"] > 0.7 * made["rounds"]


def test_the_filter_at_the_end_of_float32(emulated: ctypes.CDLL) -> None:
    """Squared distances close to the largest float32, next to ordinary ones."""
    points = torch.randn(400, 64, generator=torch.Generator().manual_seed(3))
    points[::7] *= 4.5e17
    plan = check(points, torch.tensor([300]), None, 0, True, None, None)
    added(emulated, points, plan)


def unsound(**change: object) -> tuple[Tensor, Plan]:
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(4))
    strata, groups = torch.arange(40) % 2, torch.arange(40) % 4
    plan = check(points, torch.tensor([9, 5]), strata, 0, True, groups, torch.full((4,), 9))
    return points, replace(plan, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"quotas": torch.full((4,), 2)},  # would search for an open point for ever
        {"budgets": torch.tensor([9, 50])},
        {"first": 1},
        {"strata": torch.arange(40) % 3},
        {"groups": torch.arange(40) - 1},
    ],
)
def test_ids_and_budgets_are_checked_before_the_device_sees_them(
    emulated: ctypes.CDLL, change: dict[str, object]
) -> None:
    with pytest.raises(RuntimeError, match="slap_fps_cuda: an argument is out of range"):
        native.farthest_point_cuda(emulated, *unsound(**change))


def test_many_strata_hand_over_on_the_device(emulated: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    points, strata = torch.randn(120, 5, generator=generator), torch.arange(120) % 12
    groups, quotas = torch.arange(120) % 3, torch.tensor([20, 4, 18])
    plan = check(points, torch.tensor([6, 0] * 6), strata, 0, True, groups, quotas)
    expected = fallback.farthest_point(points, plan)
    assert_same(native.farthest_point_cuda(emulated, points, plan), expected, "strata")
