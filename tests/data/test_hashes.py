"""Hashes of data files are remembered, and never wrong."""

import json
import os
import time
from pathlib import Path

import pytest

from slap_ds.data import hashes
from slap_ds.data.hashes import QUIET_NS, hashes_of
from slap_ds.files import sha256


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are hashed."""
    names: list[str] = []

    def noted(path: Path) -> str:
        names.append(path.name)
        return sha256(path)

    monkeypatch.setattr(hashes, "sha256", noted)
    return names


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three files that have been left alone for a minute."""
    found = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for path in found:
        path.write_text(f"content of {path.name}")
    later(monkeypatch, 60)
    return found


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = time.time_ns
    monkeypatch.setattr(hashes.time, "time_ns", lambda: now() + int(seconds * 1e9))


def test_a_file_is_read_once(files: list[Path], read: list[str], tmp_path: Path) -> None:
    memory = tmp_path / "cache" / "hashes.jsonl"
    expected = {path: sha256(path) for path in files}
    assert hashes_of(files, memory) == expected
    assert sorted(read) == ["0.jsonl", "1.jsonl", "2.jsonl"]
    assert hashes_of(files, memory) == expected
    assert hashes_of(files[:1], memory) == {files[0]: expected[files[0]]}
    assert len(read) == 3
    assert hashes_of(files, None) == expected
    assert len(read) == 6


@pytest.mark.parametrize("change", ["content", "same size", "same times", "replaced", "moved"])
def test_a_changed_file_is_read_again(
    change: str, files: list[Path], read: list[str], tmp_path: Path
) -> None:
    memory = tmp_path / "hashes.jsonl"
    hashes_of(files, memory)
    path, text = files[1], files[1].read_text()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    if change == "content":
        path.write_text("more " + text)
    elif change == "replaced":
        (tmp_path / "new").write_text(text.upper())
        os.utime(tmp_path / "new", ns=times)
        os.replace(tmp_path / "new", path)
    elif change == "moved":
        files[1] = path = path.rename(tmp_path / "other.jsonl")
    else:
        path.write_text(text.upper())
        if change == "same times":
            os.utime(path, ns=times)
    read.clear()
    assert hashes_of(files, memory)[path] == sha256(path)
    assert read == [path.name]


def test_a_file_that_has_just_changed_is_not_remembered(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change within the clock's granularity would not show."""
    path, memory = tmp_path / "a.jsonl", tmp_path / "hashes.jsonl"
    path.write_text("before")
    stamp = hashes._stamp(path)
    assert hashes_of([path], memory)[path] == sha256(path)
    path.write_text("behind")
    monkeypatch.setattr(hashes, "_stamp", lambda file: stamp)  # the clock has not moved on
    assert hashes_of([path], memory)[path] == sha256(path)
    assert len(read) == 2
    later(monkeypatch, QUIET_NS / 1e9 + 1)
    hashes_of([path], memory)
    hashes_of([path], memory)
    assert len(read) == 3
    later(monkeypatch, -1e6)  # the file's time lies in the future
    monkeypatch.undo()
    os.utime(path, (time.time() + 1e6,) * 2)
    memory.unlink()
    hashes_of([path], memory)
    assert not memory.exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(path: Path) -> str:
        found = sha256(path)
        path.write_text("other")
        return found

    monkeypatch.setattr(hashes, "sha256", changing)
    memory = tmp_path / "hashes.jsonl"
    hashes_of(files[:1], memory)
    assert not memory.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"\x00\xff" * 500,
        lambda data: data.replace(b'"', b""),
        lambda data: b'[1]\n{}\nnull\n["", 1, 2, 3, 4, 5, "xyz"]\n[[], 1, 2, 3, 4, 5, 6]\n',
    ],
)
def test_a_damaged_memory_does_no_harm(
    damage, files: list[Path], read: list[str], tmp_path: Path
) -> None:
    memory = tmp_path / "hashes.jsonl"
    expected = hashes_of(files, memory)
    memory.write_bytes(damage(memory.read_bytes()))
    assert hashes_of(files, memory) == expected
    read.clear()
    assert hashes_of(files, memory) == expected
    assert read == []


def test_processes_note_side_by_side(files: list[Path], tmp_path: Path) -> None:
    memory = tmp_path / "hashes.jsonl"
    stamps = [hashes._stamp(path) for path in files]
    jobs = []
    for number in range(4):
        pid = os.fork()
        if pid == 0:
            for i in range(50):
                hashes._note(memory, {(f"{number} {i}", *stamps[0][1:]): "0" * 64})
            os._exit(0)
        jobs.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in jobs] == [0] * 4
    names = {stamp[0] for stamp, _ in hashes._read(memory)}
    assert names == {f"{number} {i}" for number in range(4) for i in range(50)}
    assert all(json.loads(line) for line in memory.read_text().split("\n") if line)


def test_a_folder_that_cannot_be_written_is_no_error(
    files: list[Path], read: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    memory = tmp_path / "file" / "hashes.jsonl"
    assert hashes_of(files, memory) == hashes_of(files, memory)
    assert len(read) == 6
