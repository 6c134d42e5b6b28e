"""Checkpoints: what is written, what is refused, what is taken instead."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_ds import jsonl
from slap_ds.checkpoint import find as checkpoint
from slap_ds.checkpoint.find import CheckpointDamaged, newest
from slap_ds.checkpoint.save import Saver
from slap_ds.checkpoint.state import unpacked
from slap_ds.distributed.comm import Comm
from slap_ds.engine.tensor_files import TensorWriter, file_fact, read_tensors, write_tensors


class Numbers:
    """An engine whose whole state is one tensor; the files and the folders are the real ones."""

    kind = optimizer_kind = "torch"

    def __init__(self, value: float = 0.0) -> None:
        self.value = torch.full((1000,), value)

    def state_bytes(self) -> int:
        return 4000

    def save(self, folder: Path, writer: TensorWriter) -> None:
        (folder / "engine").mkdir()
        writer.write({"value": self.value}, folder / "engine" / "one.pt")
        writer.write({"value": self.value + 1}, folder / "engine" / "two.pt")


def make(run_dir: Path, steps: int = 3, **options) -> Saver:
    saver = Saver(run_dir, Comm(), **{"keep_last": 9, **options})
    for step in range(1, steps + 1):
        saver.save(step, Numbers(step), {"cursor": step}, {"seed": 0})
    saver.wait()
    return saver


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_the_manifest_tells_size_and_hash_of_every_file(tmp_path):
    make(tmp_path)
    assert names(tmp_path) == ["latest", "step-000001", "step-000002", "step-000003"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000003"
    found = newest(tmp_path, Comm())
    files = {p.relative_to(found.folder).as_posix() for p in found.folder.rglob("*") if p.is_file()}
    state = {"state.json", "state.safetensors"}
    assert files == {"engine/one.pt", "engine/two.pt", *state, "manifest.json"}
    assert set(found.files) == files - {"manifest.json"}
    assert all(file_fact(found.folder / name) == fact for name, fact in found.files.items())
    assert found.manifest["world_size"] == 1


def test_the_last_k_stay(tmp_path):
    make(tmp_path, steps=5, keep_last=2)
    assert names(tmp_path) == ["latest", "step-000004", "step-000005"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": (lambda f: _flip(f / "engine/one.pt"), "engine/one.pt", "SHA-256"),
    "cut short": (lambda f: os.truncate(f / "engine/two.pt", 100), "engine/two.pt", "100 bytes"),
    "missing": (lambda f: (f / "engine/two.pt").unlink(), "engine/two.pt", "missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json", "No such file"),
    "manifest bit": (lambda f: _flip(f / "manifest.json"), "manifest.json", "refused"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text(""), "manifest.json", "refused"),
    "other step": (
        lambda f: shutil.copy(f.parent / "step-000001/manifest.json", f),
        "manifest.json",
        "belongs to step 1",
    ),
    "other tensors": (lambda f: _flip(f / "state.safetensors"), "state.safetensors", "SHA-256"),
    "other state": (lambda f: (f / "state.json").write_text("{}"), "state.json", "bytes"),
    "swapped shards": (
        lambda f: (
            (f / "engine/one.pt").rename(f / "x"),
            (f / "engine/two.pt").rename(f / "engine/one.pt"),
            (f / "x").rename(f / "engine/two.pt"),
        ),
        "engine/one.pt",
        "SHA-256",
    ),
    "a link to elsewhere": (
        lambda f: ((f / "state.json").unlink(), (f / "state.json").symlink_to("/etc/hostname")),
        "state.json",
        "leads out",
    ),
}


@pytest.mark.fault_row(11)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name_and_the_one_before_is_taken(kind, tmp_path, capsys):
    make(tmp_path)
    damage, name, reason = DAMAGE[kind]
    damage(tmp_path / "checkpoints" / "step-000003")
    found = newest(tmp_path, Comm())
    assert found.step == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1, told
    assert f"step-000003/{name}" in told[0]
    assert reason in told[0]
    assert "going back to" in told[0]
    assert "step-000002" in told[0]


@pytest.mark.fault_row(11)
def test_when_every_one_is_damaged_nothing_starts_anew(tmp_path):
    make(tmp_path, steps=2)
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        _flip(folder / "engine" / "one.pt")
    with pytest.raises(CheckpointDamaged, match=r"step-000002.*step-000001.*another run_dir"):
        newest(tmp_path, Comm())


@pytest.mark.fault_row(12)
@pytest.mark.parametrize("hint", ["../elsewhere", "", "step-000009", "\x00\xff", "/etc"])
def test_latest_is_a_hint_and_no_more(hint, tmp_path, capsys):
    make(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "checkpoints" / "step-000003", elsewhere)
    (tmp_path / "checkpoints" / "latest").write_text(hint)
    assert newest(tmp_path, Comm()).folder == tmp_path / "checkpoints" / "step-000003"
    assert "no checkpoint here: ignored" in capsys.readouterr().err
    (tmp_path / "checkpoints" / "latest").unlink()
    assert newest(tmp_path, Comm()).step == 3
    assert capsys.readouterr().err == ""


@pytest.mark.fault_row(12)
def test_latest_without_a_checkpoint_is_an_error(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert newest(tmp_path, Comm()) is None
    (tmp_path / "checkpoints" / "latest").write_text("step-000003")
    with pytest.raises(CheckpointDamaged, match="step-000003"):
        newest(tmp_path, Comm())


@pytest.mark.fault_row(12)
def test_a_checkpoint_folder_that_leads_out_of_the_run_is_refused(tmp_path, capsys):
    make(tmp_path / "run")
    make(tmp_path / "other", steps=4)
    link = tmp_path / "run" / "checkpoints" / "step-000004"
    link.symlink_to(tmp_path / "other" / "checkpoints" / "step-000004")
    assert newest(tmp_path / "run", Comm()).step == 3
    assert "leads out of the run's folder" in capsys.readouterr().err


@pytest.mark.fault_row(10)
def test_no_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    saver = make(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1234))
    with pytest.raises(ValueError, match="no checkpoint after step 4") as told:
        saver.save(4, Numbers(), {}, {})
    assert str(tmp_path / "checkpoints") in str(told.value)
    assert "1,234 are free" in str(told.value)
    need = sum(fact.bytes for fact in checkpoint.find(tmp_path)[-1].files.values())
    assert f"{need:,} bytes are needed" in str(told.value)
    assert "step-000003 is unchanged" in str(told.value)
    assert names(tmp_path) == ["latest", "step-000001", "step-000002", "step-000003"]


@pytest.mark.fault_row(10)
@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_up_leaves_the_last_good_one(background, tmp_path):
    class Full(Numbers):
        def save(self, folder: Path, writer: TensorWriter) -> None:
            super().save(folder, writer)
            (folder / "three.pt").symlink_to("/dev/full")
            writer.write({"value": self.value}, folder / "three.pt")

    saver = make(tmp_path, background=background)

    def save() -> None:
        saver.save(4, Full(), {}, {})
        saver.wait()

    with pytest.raises(ValueError, match=r"three.pt: No space left on device \([\d,]+ bytes"):
        save()
    assert names(tmp_path) == ["latest", "step-000001", "step-000002", "step-000003"]
    assert newest(tmp_path, Comm()).step == 3


def test_what_is_written_wrongly_is_never_made_visible(tmp_path, monkeypatch):
    def lossy(state, path, progress):
        fact = write_tensors(state, path, progress)
        _flip(path)
        return fact

    saver = make(tmp_path)
    monkeypatch.setattr("slap_ds.engine.tensor_files.write_tensors", lossy)
    with pytest.raises(ValueError, match=r"one.pt: reads back differently"):
        saver.save(4, Numbers(), {}, {})
    assert newest(tmp_path, Comm()).step == 3


def test_a_save_shows_block_by_block_that_it_gets_on(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("slap_ds.engine.tensor_files.BLOCK_BYTES", 512)
    monkeypatch.setattr("slap_ds.engine.tensor_files.SYNC_BYTES", 2048)
    monkeypatch.setattr("os.fdatasync", lambda file: synced.append(os.fstat(file).st_size))
    saver = make(tmp_path, steps=1)
    sizes = [f.bytes for name, f in newest(tmp_path, Comm()).files.items() if name[0] == "e"]
    assert saver.comm.heart.pieces >= 2 * sum(size // 512 for size in sizes)  # and read back
    assert len(synced) == sum(size // 2048 for size in sizes)
    assert all(size >= 2048 for size in synced)


def test_in_the_background_a_save_hides_no_standstill(tmp_path):
    """What a thread writes while training goes on is no progress of training."""
    saver = Saver(tmp_path, Comm(), background=True)
    heart = saver.comm.heart
    pieces = []

    class Slow(Numbers):
        def save(self, folder: Path, writer: TensorWriter) -> None:
            write = writer._write
            writer._write = lambda *job: (gate.wait(20), pieces.append(heart.pieces), write(*job))
            super().save(folder, writer)

    gate = threading.Event()
    saver.save(1, Slow(), {}, {})
    gate.set()
    while not saver._pending.writer.done():
        time.sleep(0.01)
    assert heart.pieces == pieces[0]
    saver.wait()
    assert heart.pieces > pieces[0]


def test_in_the_background_the_state_is_that_of_the_moment(tmp_path):
    """The thread is held up until the caller has changed everything it saved."""
    gate = threading.Event()

    class Slow(Numbers):
        def save(self, folder: Path, writer: TensorWriter) -> None:
            write = writer._write
            writer._write = lambda *job: (gate.wait(20), write(*job))
            super().save(folder, writer)

    engine, state = Slow(7.0), {"cursor": 1, "selector": {"seen": torch.ones(3)}}
    saver = Saver(tmp_path, Comm(), background=True)
    saver.save(1, engine, state, {})
    saver.poll()
    assert newest(tmp_path, Comm()) is None, "visible before it was written"
    engine.value.fill_(-1)
    state["cursor"] = 99
    state["selector"]["seen"].fill_(-1)
    gate.set()
    saver.wait()
    found = newest(tmp_path, Comm())
    assert read_tensors(found.folder / "engine" / "one.pt")["value"].eq(7).all()
    assert json.loads((found.folder / "state.json").read_text()) == {"cursor": 1, "selector": {}}
    assert unpacked(found.folder)["selector"]["seen"].tolist() == [1, 1, 1]
    assert [record["checkpoint_background"] for record in saver.records] == [True]


def test_an_interrupted_save_leaves_no_trace_in_the_next(tmp_path):
    make(tmp_path)
    (tmp_path / "checkpoints" / ".tmp-latest").write_text("step-0000")
    left = tmp_path / "checkpoints" / ".tmp-000004"
    shutil.copytree(tmp_path / "checkpoints" / "step-000003", left)
    assert newest(tmp_path, Comm()).step == 3
    Saver(tmp_path, Comm(), keep_last=9).save(5, Numbers(), {}, {})
    assert names(tmp_path)[:2] == ["latest", "step-000001"]


def test_saving_over_a_damaged_one_replaces_it(tmp_path, capsys):
    make(tmp_path)
    _flip(tmp_path / "checkpoints" / "step-000003" / "engine" / "one.pt")
    Saver(tmp_path, Comm(), keep_last=9).save(3, Numbers(8.0), {}, {})
    assert newest(tmp_path, Comm()).step == 3
    assert capsys.readouterr().err == ""


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_no_bytes_of_a_manifest_do_more_than_be_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzz" / "step-000001"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointDamaged):
        checkpoint.read(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@settings(max_examples=500, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "step": json_values,
            "world_size": json_values,
            "files": json_values | st.dictionaries(st.text(max_size=30), json_values, max_size=3),
        },
    )
)
def test_a_manifest_with_a_right_hash_and_wrong_values_is_refused_or_harmless(
    tmp_path_factory, manifest
):
    """Somebody who can write the folder can write the hash too; nothing but files in it is read."""
    folder = tmp_path_factory.getbasetemp() / "sealed" / "step-000001"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(jsonl.dumps(checkpoint.sealed(manifest)))
    with pytest.raises(CheckpointDamaged):
        checkpoint.check(checkpoint.read(folder))


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "NaN", '{"a": -Infinity}', "[" * 10**5, ""])
def test_json_is_read_strictly(text):
    with pytest.raises(ValueError, match=r"\w"):
        jsonl.loads(text)


def test_a_number_that_is_none_is_not_written():
    with pytest.raises(ValueError, match="JSON"):
        jsonl.dumps({"average": float("nan")})
