"""What is measured of a step on a GPU, with a GPU's functions replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slap_ds.bench.environment import describe
from slap_ds.timing import peak_gib, start_peak


def test_the_peak_is_that_of_the_time_since_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"peak": 7 * 2**30}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update(peak=0))
    gpu = torch.device("cuda", 1)
    assert peak_gib(gpu) == 7.0
    start_peak(gpu)
    held["peak"] = max(held["peak"], 2 * 2**30)
    assert peak_gib(gpu) == 2.0
    start_peak(torch.device("cpu"))
    assert peak_gib(torch.device("cpu")) is None
    assert held["peak"] == 2 * 2**30


def test_every_step_starts_its_peak_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from slap_ds.train import step

    started = []

    class Stop(Exception):
        pass

    def watch(device: torch.device) -> None:
        raise Stop

    monkeypatch.setattr(step, "start_peak", started.append)
    monkeypatch.setattr(step, "Stopwatch", watch)
    device = torch.device("cuda", 3)
    run = type("Run", (), {"engine": type("Engine", (), {"device": device})})
    with pytest.raises(Stop):
        step.plan_step(run, 0)  # type: ignore[arg-type]
    assert started == [device]


def test_tests_of_the_cpu_see_no_gpu() -> None:
    import os

    from tests.conftest import asks_for_gpu

    assert not asks_for_gpu("")
    assert not asks_for_gpu("not slow and not gpu and not nodes and not faults")
    assert not asks_for_gpu("slow")
    assert asks_for_gpu("gpu")
    assert asks_for_gpu("gpu and not multigpu or slow")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_results_are_described_on_a_machine_without_git(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe(torch.device("cpu"))["commit"] == "unknown"
