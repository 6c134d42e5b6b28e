"""`profile.steps` leaves a trace with phases in it; `engine.deterministic` does what it says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes import losses, run_config, tiny_config, tiny_model


def settings(folder: Path, name: str, **sections: Any) -> Any:
    model = folder / "model"
    path = str(model) if model.is_dir() else tiny_model(model)
    return tiny_config(path, folder / name, engine={"kind": "torch"}, **sections)


def test_the_trace_holds_the_steps_asked_for_and_their_phases(tmp_path: Path) -> None:
    run_config(settings(tmp_path, "run", steps=4, profile={"steps": [1, 2]}))
    events = json.loads((tmp_path / "run" / "profile" / "rank-0.json").read_text())["traceEvents"]
    names = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    ours = [name.removeprefix("slap_ds: ") for name in names if name.startswith("slap_ds: ")]
    assert ours.count("score") == 2
    assert ours.count("optimizer") == 2
    assert {"gather", "select", "scatter", "train", "forward", "backward"} <= set(ours)
    assert any(e["name"] == "aten::mm" for e in events)


def test_a_range_at_the_end_of_the_run_is_written_too(tmp_path: Path) -> None:
    run_config(settings(tmp_path, "run", steps=2, profile={"steps": [1, 99]}))
    assert (tmp_path / "run" / "profile" / "rank-0.json").stat().st_size > 1000


@pytest.mark.parametrize("steps", [[3, 2], [-1, 2]])
def test_steps_in_no_order_are_refused(tmp_path: Path, steps: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected \[first, last\]"):
        settings(tmp_path, "run", profile={"steps": steps})


@pytest.fixture
def restored() -> Iterator[None]:
    before = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cudnn.deterministic = False
    os.environ.clear()
    os.environ.update(before)


def test_a_deterministic_run_uses_no_other_kernels(tmp_path: Path, restored: None) -> None:
    deterministic = {"kind": "torch", "deterministic": True}
    path = tiny_model(tmp_path / "model")
    plain = losses(run_config(tiny_config(path, tmp_path / "a", steps=3, engine={"kind": "torch"})))
    assert not torch.are_deterministic_algorithms_enabled()
    found = losses(run_config(tiny_config(path, tmp_path / "b", steps=3, engine=deterministic)))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert found == plain  # CPUs give the same bits in any case


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_3"])
def test_attention_without_a_fixed_order_is_refused(tmp_path: Path, attention: str) -> None:
    with pytest.raises(ValueError, match=f"deterministic: .* model.attention {attention}"):
        tiny_config(
            "model",
            tmp_path,
            engine={"deterministic": True},
            model={"attention": attention},
        )
