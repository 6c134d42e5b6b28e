"""The farthest-point kernels on a GPU: the CPU's bits, again and again.

`python tests/gpu/check.py` runs these, the sanitizer and the timings.
"""

from __future__ import annotations

import pytest
import torch

from slap_ds.ops import farthest_point, native
from tests.ops.test_farthest_point import KINDS, assert_same, make_points, make_request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        isinstance(native.cuda_library(), str), reason="the CUDA library is not built"
    ),
]


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "d", "k", "quotas"),
    [
        (1, 1, 1, False),
        (129, 33, 1, False),
        (1000, 64, 5, True),
        (3000, 512, 1, False),
        (2500, 100, 64, True),
        (700, 4100, 2, False),
    ],
)
def test_the_bits_of_the_cpu(kind: str, n: int, d: int, k: int, quotas: bool, across: bool) -> None:
    request = make_request(3, kind, n, d, k, KINDS.index(kind) % 2 == 1, quotas)
    expected = farthest_point(**request, across_strata=across)
    features = request.pop("features").cuda()
    found = farthest_point(features, **request, across_strata=across)
    assert found.picks.device == features.device
    assert_same(tuple(t.cpu() for t in found), expected, kind)


def test_65536_points() -> None:
    points = make_points("clusters", 65536, 32, torch.Generator().manual_seed(0))
    budgets = torch.tensor([20000])
    found = farthest_point(points.cuda(), budgets, first=7)
    expected = farthest_point(points, budgets, first=7)
    assert_same(tuple(t.cpu() for t in found), expected, "65536")


def test_250_repeats_on_two_streams_are_equal() -> None:
    """A race shows as a difference sooner or later; streams make the schedule vary."""
    request = make_request(4, "duplicates", 2000, 96, 3, False, True)
    features = request.pop("features").cuda()
    expected = farthest_point(features, **request)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for i in range(250):
        with torch.cuda.stream(streams[i % 2]):
            found = farthest_point(features, **request)
        streams[i % 2].synchronize()
        assert_same(found, expected, f"repeat {i}")


def test_work_is_queued_behind_the_stream_of_the_caller() -> None:
    points = make_points("normal", 2000, 64, torch.Generator().manual_seed(0))
    budgets = torch.tensor([500])
    expected = farthest_point(points, budgets, first=0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros(2000, 64, device="cuda")
        torch.cuda._sleep(50_000_000)
        late.copy_(points, non_blocking=True)
        found = farthest_point(late, budgets, first=0)
    stream.synchronize()
    assert_same(tuple(t.cpu() for t in found), expected, "stream")


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_features_off_the_current_device() -> None:
    request = make_request(5, "normal", 900, 48, 2, False, False)
    expected = farthest_point(**request)
    found = farthest_point(request.pop("features").to("cuda:1"), **request)
    assert found.picks.device == torch.device("cuda:1")
    assert_same(tuple(t.cpu() for t in found), expected, "cuda:1")


def test_bad_values_are_refused() -> None:
    points = torch.zeros(20, 3, device="cuda")
    points[4, 1] = float("nan")
    with pytest.raises(ValueError, match=r"features: found nan at \[4, 1\]"):
        farthest_point(points, torch.tensor([3]), first=0)


def test_opcheck() -> None:
    args = (torch.randn(40, 6).cuda(), torch.tensor([5, 4]), torch.arange(40) % 2, 0, True)
    torch.library.opcheck(torch.ops.slap_ds.farthest_point.default, (*args, None, None))
