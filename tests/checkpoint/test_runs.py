"""Runs that save, go back past damage, and resume."""

import errno
import math
import shutil
from pathlib import Path

import pytest
import torch

from slap_ds import jsonl
from slap_ds.checkpoint import find as checkpoint
from slap_ds.checkpoint.state import packed, unpacked
from slap_ds.config.schema import Config
from slap_ds.engine.tensor_files import read_tensors, write_tensors
from slap_ds.jsonl import read_lines
from tests.checkpoint.test_checkpoint import _flip
from tests.recipes import losses, run_config, tiny_config, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def config(model: str, run_dir: Path, **sections) -> Config:
    sections = {"steps": 6, "data": {"eval": []}, "engine": {"kind": "torch"}, **sections}
    return tiny_config(model, run_dir, **sections)


def test_in_the_background_a_run_saves_the_same(model, tmp_path):
    for name, background in (("now", False), ("later", True)):
        every = {"every": 2, "async": background}
        run_config(config(model, tmp_path / name, checkpoint=every))
    lines = read_lines(tmp_path / "later" / "metrics.jsonl")
    records = [record for record in lines if record["event"] == "checkpoint"]
    assert [r["step"] for r in records] == [1, 3, 5]
    assert all(r["checkpoint_background"] for r in records)
    assert all(r["checkpoint_stall_s"] >= 0 for r in records)
    now, later = (checkpoint.find(tmp_path / name) for name in ("now", "later"))
    assert [found.step for found in now] == [found.step for found in later] == [4, 6]
    for a, b in zip(now, later, strict=True):
        left, right = (read_tensors(found.folder / "torch.pt") for found in (a, b))
        assert _equal(left, right)


def _equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


@pytest.mark.fault_row(11)
def test_a_run_goes_back_past_a_damaged_checkpoint_and_ends_the_same(model, tmp_path, capsys):
    whole = losses(run_config(config(model, tmp_path / "whole", checkpoint={"every": 2})))
    again = config(model, tmp_path / "run", checkpoint={"every": 2, "keep_last": 9})
    run_config(again)
    for step in (6, 4):
        folder = tmp_path / "run" / "checkpoints" / f"step-00000{step}"
        _flip(folder / "torch.pt") if step == 6 else shutil.rmtree(folder)
    capsys.readouterr()
    assert losses(run_config(again)) == whole
    assert "step-000006/torch.pt is refused: its SHA-256" in capsys.readouterr().err


def test_a_run_saved_before_tensors_had_a_file_is_refused_in_one_line(model, tmp_path):
    again = config(model, tmp_path / "run")
    run_config(again)
    (found,) = checkpoint.find(tmp_path / "run")
    (found.folder / "state.safetensors").unlink()
    manifest = {**found.manifest, "version": "0.1.0"}
    del manifest["files"]["state.safetensors"]
    (found.folder / "manifest.json").write_text(jsonl.dumps(checkpoint.sealed(manifest)))
    with pytest.raises(
        ValueError, match=r"saved by slap_ds 0\.1\.0; only runs of 0\.2\.0 and later"
    ) as told:
        run_config(again)
    assert "\n" not in str(told.value)


def test_tensors_of_the_state_are_exact_to_the_bit(tmp_path):
    x = torch.tensor([[1e-45, -0.0, math.inf], [math.nan, 1 / 3, 3e38]])
    state = {
        "a": {"b": {"x": x, "n": 1}, "none": None},
        "empty": torch.zeros(0, 7),
        "turned": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).t(),
    }
    for name, data in packed(state).items():
        (tmp_path / name).write_bytes(data)
    found = unpacked(tmp_path)
    assert torch.equal(found["a"]["b"].pop("x").view(torch.int32), x.view(torch.int32))
    assert found["a"] == {"b": {"n": 1}, "none": None}
    assert found["empty"].shape == (0, 7)
    assert torch.equal(found["turned"], state["turned"])
    assert found["turned"].dtype == torch.float64
    (tmp_path / "state.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match=r"state\.safetensors is refused, it is damaged"):
        unpacked(tmp_path)


def test_errno_is_what_the_system_said(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space") as told:
        write_tensors({"x": torch.zeros(10**6)}, tmp_path / "full")
    assert told.value.errno == errno.ENOSPC
    assert told.value.filename == str(tmp_path / "full")
