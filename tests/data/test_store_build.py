"""How a store is built: the same by any number of processes, and on from where one was killed."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from slap_ds.data import build as build_module
from slap_ds.data import parts, writer
from slap_ds.data.build import ABANDONED_S, build_store, remove_abandoned
from slap_ds.data.encoding import Encoded
from slap_ds.data.store import TokenStore
from slap_ds.files import sha256
from tests.data.test_store import TEMPLATE, listed, row, write

ROOT = Path(__file__).parents[2]


def build(paths: list[str], cache: Path, **changes: Any) -> TokenStore:
    options: dict[str, Any] = {
        "format": "auto",
        "template": TEMPLATE,
        "max_tokens": 40,
        "over_length": "truncate",
        "cache_dir": cache,
        "max_reject_share": 0.9,
    }
    return build_store(paths, **{**options, **changes})


def varied(first: int, count: int) -> Iterator[dict[str, object]]:
    """Rows of every fate: stored, cut, without an answer that fits, rejected, with media."""
    for i in range(first, first + count):
        labels: dict[str, object] = {"task": f"task {i % 7}", "lang": "enzhde"[i % 3 * 2 :][:2]}
        if i % 5 == 0:
            labels |= {"source": f"book {i % 11}", "image": "a.png"}
        if i % 13 == 0:
            yield {"nothing": i}
        else:
            yield row("q" * (1 + i % 37), "a" * (1 + i % 23), **labels)


def every_kind(folder: Path) -> list[str]:
    """Many small files of every kind, some with broken lines."""
    paths = [write(folder / f"{i}.jsonl", list(varied(40 * i, 40))) for i in range(6)]
    with open(paths[2], "ab") as file:
        file.write(b'{"messages": \n\n\n[1]\nnot UTF-8 \xff\n' + b"x" * 5000 + b"\n")
    listed = folder / "list.json"
    listed.write_text(json.dumps([*varied(300, 50), [[1]], 3]))
    packed = folder / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(paths[3]).read_bytes()))
    table = folder / "table.parquet"
    Dataset.from_list([dict(prompt="q" * i, completion="a") for i in range(90)]).to_parquet(table)
    Dataset.from_list(list(varied(1, 12))).save_to_disk(str(folder / "saved"))
    return [*paths, str(listed), str(packed), str(table), str(folder / "saved"), paths[0]]


def content(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = every_kind(tmp_path / "data")
    found = []
    for workers, rows, size in ((1, 512, 10**6), (2, 7, 10**6), (3, 64, 900)):
        monkeypatch.setattr(parts, "CHUNK_ROWS", rows)
        monkeypatch.setattr(parts, "CHUNK_BYTES", size)
        store = build(paths, tmp_path / f"cache {workers}", workers=workers)
        found.append(content(store.folder))
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {"manifest.json", *writer.FILES}
    counts = store.counts
    assert min(counts.rejected, counts.truncated, counts.dropped_no_trained_tokens) > 5
    assert counts.with_media > 5
    assert len(store.names["task"]) == 8
    # What the files say, counted the slow way.
    lines = (store.folder / "rejects.jsonl").read_text("utf-8").splitlines()
    rejects = [json.loads(line) for line in lines]
    broken = [r["line"] for r in rejects if r["file"] == paths[2] and r["line"] > 40]
    assert broken == [41, 44, 45, 46]
    first = [i + 1 for i, r in enumerate(varied(0, 40)) if "nothing" in r]
    assert [r["line"] for r in rejects if r["file"] == paths[0]] == 2 * first
    third = store.file == 3
    lengths = [len("q" * (1 + i % 37)) for i in range(120, 160) if i % 13]
    numbers = [1 + i - 120 for i in range(120, 160) if i % 13]
    fits = [n for n, length in zip(numbers, lengths, strict=True) if length + 19 < 40]
    assert store.line[third].tolist() == fits


class Counting(type(TEMPLATE)):  # type: ignore[misc]
    """Notes in a file how many rows it encodes, by any process; and may be slow."""

    log: Path
    pause_s = 0.0

    def encode_batch(self, conversations: Any, tools: Any = ()) -> list[Encoded | ValueError]:
        with self.log.open("a") as file:
            file.write(f"{len(conversations)}\n")
        time.sleep(self.pause_s)
        encoded: list[Encoded | ValueError] = super().encode_batch(conversations, tools)
        return encoded


def counting(log: Path, pause_s: float = 0.0) -> Counting:
    template: Counting = object.__new__(Counting)
    template.__dict__.update({**TEMPLATE.__dict__, "log": log, "pause_s": pause_s})
    return template


def encoded_rows(log: Path) -> int:
    return sum(map(int, log.read_text().split()))


STOPPED = """
import os, signal, sys
from pathlib import Path
from slap_ds.data import parts, writer
from tests.data.test_store_build import build, counting

# A shell that starts jobs in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
parts.CHUNK_ROWS, writer.EVERY_S = 50, 0.0
cache, log, how, workers, *paths = sys.argv[1:]
add, finished = writer.StoreWriter.add, 0

def added(self, part):
    add(self, part)
    self._settle()
    if self.kept >= 400:
        os.kill(os.getpid(), getattr(signal, how))

writer.StoreWriter.add = added
build(paths, Path(cache), template=counting(Path(log)), workers=int(workers))
"""


def stop(how: str, cache: Path, log: Path, workers: int, paths: list[str]) -> None:
    """Build until 400 rows are finished, then kill the process, or interrupt it."""
    command = [sys.executable, "-c", STOPPED, str(cache), str(log), how, str(workers), *paths]
    result = subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, check=False)
    assert result.returncode in (-signal.SIGKILL, -signal.SIGINT), result.stderr
    assert result.stderr.count(b"Traceback") <= (how == "SIGINT")


def unfinished(cache: Path) -> Path:
    (folder,) = cache.glob(".building-*")
    return folder


@pytest.mark.parametrize(("how", "workers"), [("SIGKILL", 3), ("SIGKILL", 1), ("SIGINT", 2)])
def test_a_killed_build_goes_on_from_what_is_finished(
    how: str, workers: int, tmp_path: Path
) -> None:
    paths = [write(tmp_path / f"{i}.jsonl", list(varied(100 * i, 100))) for i in range(10)]
    usable = sum("nothing" not in r for r in varied(0, 1000))
    whole = build(paths, tmp_path / "whole")
    cache, log = tmp_path / "cache", tmp_path / "log"
    stop(how, cache, log, workers, paths)
    kept = writer.rows_kept(unfinished(cache))
    assert 400 <= kept <= 500
    log.unlink()
    seen: list[int] = []
    store = build(paths, cache, template=counting(log), progress=seen.append)
    assert seen[0] > kept
    assert seen[-1] == 1000
    assert encoded_rows(log) == usable - sum("nothing" not in r for r in varied(0, kept))
    assert content(store.folder) == content(whole.folder)
    assert listed(cache) == [store.folder.name]


@pytest.mark.parametrize("name", ["tokens.bin", "line.bin", "rejects.jsonl", "journal.jsonl"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_what_is_damaged_of_a_killed_build_is_made_again(
    name: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "CHUNK_ROWS", 50)
    monkeypatch.setattr(writer, "EVERY_S", 0.0)
    path = write(tmp_path / "data.jsonl", list(varied(0, 500)))
    whole = build([path], tmp_path / "whole")
    cache, log = tmp_path / "cache", tmp_path / "log"
    add = writer.StoreWriter.add

    def added(self: writer.StoreWriter, part: parts.Part) -> None:
        add(self, part)
        self._settle()
        if self.kept == 400:
            raise RuntimeError("stop")

    monkeypatch.setattr(writer.StoreWriter, "add", added)
    with pytest.raises(RuntimeError, match="stop"):
        build([path], cache)
    monkeypatch.setattr(writer.StoreWriter, "add", add)
    file = unfinished(cache) / name
    data = bytearray(file.read_bytes())
    ends = [facts["sizes"].get(name, place) for place, facts in writer._lines(file.parent)]
    assert len(ends) == 8
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[:-3])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    store = build([path], cache, template=counting(log))
    assert content(store.folder) == content(whole.folder)
    usable = [sum("nothing" not in r for r in varied(at, 50)) for at in range(0, 500, 50)]
    done = {"gone": 0, "cut": 7, "flipped": sum(end <= len(data) // 2 for end in ends)}[damage]
    assert encoded_rows(log) == sum(usable[done:])


WAITING = """
import logging, sys
from pathlib import Path
from tests.data.test_store_build import build, counting

logging.basicConfig(format="%(message)s")
cache, log, path = sys.argv[1:]
print(build([path], Path(cache), template=counting(Path(log), 1.0)).fingerprint)
"""


def test_of_two_builders_one_waits_and_takes_what_the_other_made(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", list(varied(0, 1200)))
    cache, log = tmp_path / "cache", tmp_path / "log"
    command = [sys.executable, "-c", WAITING, str(cache), str(log), path]
    jobs = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    told = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], told
    assert told[0][0] == told[1][0]
    assert sum(b"another process tokenises the same data" in errors for _, errors in told) <= 1
    assert encoded_rows(log) == sum("nothing" not in r for r in varied(0, 1200))
    assert len(listed(cache)) == 1


def test_without_locks_each_builds_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    path = write(tmp_path / "data.jsonl", list(varied(0, 1200)))
    cache = tmp_path / "cache"
    faster: list[TokenStore] = []

    def build_in_between(rows: int) -> None:
        if not faster:
            faster.append(build([path], cache))

    slower = build([path], cache, progress=build_in_between)
    assert slower.folder == faster[0].folder
    assert slower[1].ids.tolist() == faster[0][1].ids.tolist()
    assert set(listed(cache)) == {slower.folder.name, f".building-{slower.folder.name}"}


def test_old_folders_that_nobody_builds_in_are_removed(tmp_path: Path) -> None:
    now = time.time()
    for name, age_s in (("new", ABANDONED_S / 2), ("old", 2 * ABANDONED_S), ("held", 1e9)):
        folder = tmp_path / f".building-{name}"
        folder.mkdir()
        for path in (folder / "lock", folder / "tokens.bin", folder):
            if path != folder:
                path.touch()
            os.utime(path, (now - age_s, now - age_s))
    holder = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, 2); print(flush=True)"
    held = tmp_path / ".building-held" / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", holder + "; sys.stdin.read()", str(held)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as job:
        assert job.stdout is not None
        job.stdout.readline()
        remove_abandoned(tmp_path)
        left = sorted(path.name for path in tmp_path.iterdir())
        job.communicate()
    assert left == [".building-held", ".building-new"]
    remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".building-new"]


def test_a_damaged_archive_is_named_whoever_reads_it(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", list(varied(0, 100)))
    bad = tmp_path / "bad.jsonl.gz"
    bad.write_bytes(gzip.compress(Path(good).read_bytes())[:-200])
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"bad.jsonl.gz: damaged archive, unreadable after"):
            build([good, str(bad)], tmp_path / "cache", workers=workers)
    assert listed(tmp_path / "cache") == []


def test_small_data_take_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    path = Path(write(tmp_path / "data.jsonl", list(varied(0, 10))))
    (source,) = build_module.find_sources([str(path)])
    assert build_module._workers([source]) == 1
    os.truncate(path, 3 * build_module.WORKER_BYTES)
    assert build_module._workers([source]) == 3
    assert build_module._workers([source] * 100) == build_module.MOST_WORKERS
