"""The kernels of `csrc/cuda/` without a GPU: emulated thread by thread, held to the same bits.

What only a GPU can show (races, memory ordering, speed) is in tests/gpu/.
"""

from __future__ import annotations

import ctypes
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from slap_ds.ops import fallback, native
from slap_ds.ops.plan import check
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


def test_many_strata_hand_over_on_the_device(emulated: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    points, strata = torch.randn(120, 5, generator=generator), torch.arange(120) % 12
    groups, quotas = torch.arange(120) % 3, torch.tensor([20, 4, 18])
    plan = check(points, torch.tensor([6, 0] * 6), strata, 0, True, groups, quotas)
    expected = fallback.farthest_point(points, plan)
    assert_same(native.farthest_point_cuda(emulated, points, plan), expected, "strata")
