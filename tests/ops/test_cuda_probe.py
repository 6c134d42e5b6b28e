"""A CUDA library that is there and cannot run is no reason to stop."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slap_ds.ops import active_path, farthest_point, native
from slap_ds.ops.farthest_point import run_plan
from slap_ds.ops.plan import check


class Unable:
    """A library whose first call fails as with a driver that is too old."""

    def __init__(self) -> None:
        self.calls = 0
        self.slap_fps_cuda_workspace: Any = lambda *_: 64
        self.slap_fps_cuda_error: Any = lambda *_: b"Centre: no kernel image is available"
        self.slap_fps_cuda: Any = self._fail

    def _fail(self, *_: Any) -> int:
        self.calls += 1
        return 4


@pytest.fixture
def unable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Unable]:
    library = Unable()
    for name in ("slap_fps_cuda_workspace", "slap_fps_cuda_error"):
        value = getattr(library, name)
        setattr(library, name, type("F", (), {"__call__": lambda _, *a, v=value: v(*a)})())
    monkeypatch.setattr(native, "cuda_library", lambda: library)
    probe = native.usable_cuda_library
    probe.cache_clear()
    yield library
    probe.cache_clear()


def test_it_is_tried_once_and_told_why_it_is_not_used(unable: Unable) -> None:
    for _ in range(3):
        why = native.usable_cuda_library(torch.device("cpu"))
    assert unable.calls == 1
    assert why == (
        "_slap_fps_cuda.so does not run on this GPU (slap_fps_cuda: Centre: no kernel image is "
        "available)"
    )


def test_features_on_such_a_gpu_are_chosen_on_the_cpu(
    unable: Unable, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    plan = check(points, torch.tensor([9]), None, 0, True, None, None)
    expected = farthest_point(points, torch.tensor([9]), first=0)
    on_gpu: Any = SimpleNamespace(
        is_cuda=True, device=torch.device("cpu"), cpu=lambda: points, shape=points.shape
    )
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    picks, _, _ = run_plan(on_gpu, plan)
    assert unable.calls == 1
    assert torch.equal(picks, expected.picks)


def test_doctor_says_so(unable: Unable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(native, "usable_cuda_library", lambda device: f"broken on {device}")
    path, why = active_path()
    assert path.startswith("cpu") or path == "pytorch fallback"
    assert "broken on cuda:0" in why


def test_the_header_and_the_loader_agree_on_the_error_codes() -> None:
    header = (Path(native.__file__).parents[2] / "csrc" / "slap_fps.h").read_text()
    assert "SLAP_FPS_CUDA_ERROR = 4" in header
    assert set(native.STATUS) == {1, 2, 3}
    assert ctypes.sizeof(native._Problem) == 6 * 8 + 2 * 4 + 5 * 8
