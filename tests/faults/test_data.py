"""Rows that break parsers: each costs itself, and what kills the reader is told by its place."""

import gzip
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from slap_ds.data import rows, sources
from slap_ds.data.guard import AHEAD, Child, in_order
from slap_ds.data.sources import Limits
from tests.data.test_store import build, listed, row, write

pytestmark = pytest.mark.fault_row(17)
GOOD = json.dumps(row("a question", "an answer")).encode()
BAD = {
    b"[" * 200_000: "nested deeper than 64 levels",
    b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}": "nested deeper than 64 levels",
    b'{"a":' * 100 + b"1" + b"}" * 100: "nested deeper than 64 levels",
    b'{"prompt": "caf\xe9", "completion": "x"}': "not UTF-8",
    b'{"prompt": 17, "completion": "x"}': "'prompt' is a number, expected text",
    b'{"prompt": "x", "completion": NaN}': "NaN is not JSON",
    b'{"prompt": "x", "completion": 1e999, "x": Infinity}': "Infinity is not JSON",
    b'{"prompt": "x"}': "unknown format",
    b'{"prompt": "x", "completion": ""}': "'completion' is empty",
    b'{"prompt": "x", "prompt": "y", "completion": "z"}': "a key is repeated",
    b'{"prompt": "x", "completion": "' + b"y" * 3000 + b'"}': "longer than 2,000 bytes",
    b"\x00\x01\x02": "not JSON",
    b"1" * 1999: "the row is a number",
    b"null": "missing, expected an object",
}


def test_every_bad_row_costs_itself_alone(tmp_path):
    lines = [line for bad in BAD for line in (bad, GOOD)]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    # The deep rows are long: a limit on bytes must not be what stops them.
    store = build(str(path), tmp_path / "cache", max_reject_share=1.0, limits=Limits(2**20))
    long = build(str(path), tmp_path / "cache", max_reject_share=1.0, limits=Limits(2000))
    rejects = [json.loads(x) for x in (store.folder / "rejects.jsonl").open()]
    strict = [json.loads(x) for x in (long.folder / "rejects.jsonl").open()]
    assert len(long) == len(BAD)
    assert len(store) == len(BAD) + 1, "the 3,000 bytes are within the larger limit"
    by_line = {reject["line"]: reject["reason"] for reject in strict} | {
        reject["line"]: reject["reason"] for reject in rejects
    }
    for number, (_, reason) in enumerate(BAD.items()):
        assert reason in by_line[2 * number + 1], (number, by_line[2 * number + 1])
    assert {reject["file"] for reject in rejects} == {str(path)}


def test_depth_is_a_setting(tmp_path):
    deep = json.dumps({**row("q", "a"), "extra": [[[[1]]]]}).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b"\n" + deep)
    assert len(build(str(path), tmp_path / "cache", max_reject_share=1.0)) == 2
    few = build(str(path), tmp_path / "cache", max_reject_share=1.0, limits=Limits(depth=4))
    assert len(few) == 1


def test_a_small_archive_that_unpacks_to_much_is_read_within_bounds(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(200):
            file.write(b" " * 2**20)
        file.write(b"\n" + GOOD + b"\n")
    assert path.stat().st_size < 2**21
    tracemalloc.start()
    found = list(rows.read_rows(sources.find_sources([str(path)])[0], Limits(2**20)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [number for number, _ in found] == [1, 2]
    assert "longer than 1 MiB" in str(found[0][1])
    assert peak < 16 * 2**20
    listed = tmp_path / "bomb.json.gz"
    with gzip.open(listed, "wb", compresslevel=1) as file:
        file.write(b"[" + b" " * 2**23 + b"]")
    with pytest.raises(ValueError, match=r"bomb.json.gz: .*longer than 1 MiB.*\.jsonl"):
        list(rows.read_rows(sources.find_sources([str(listed)])[0], Limits(list_bytes=2**20)))


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "empty.jsonl.gz"])
def test_an_empty_file_is_an_error(name, tmp_path):
    with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wb"):
        pass
    with pytest.raises(ValueError, match="no rows"):
        build(str(tmp_path / name), tmp_path / "cache")


def test_a_row_that_kills_the_parser_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl", [row(f"q{i}", "a") for i in range(9)])
    parse = rows._parse_line

    def crashing(line, limits):
        if b'"q6"' in line:
            os.kill(os.getpid(), signal.SIGSEGV)
        return parse(line, limits)

    monkeypatch.setattr(rows, "_parse_line", crashing)
    with pytest.raises(ValueError, match=r"died \(SIGSEGV\) at .*data.jsonl, line 7:") as told:
        build(path, tmp_path / "cache")
    assert "\n" not in str(told.value)
    assert listed(tmp_path / "cache") == []
    monkeypatch.undo()
    assert len(build(path, tmp_path / "cache")) == 9


def test_rows_that_kill_the_tokenizer_are_named(tmp_path):
    from tests.data.test_store import TEMPLATE

    class Crashing(type(TEMPLATE)):
        def encode_batch(self, conversations):
            os.kill(os.getpid(), signal.SIGKILL)

    template = object.__new__(Crashing)
    template.__dict__.update(TEMPLATE.__dict__)
    path = write(tmp_path / "data.jsonl", [row(f"q{i}", "a") for i in range(9)])
    place = r"died \(SIGKILL\) at .*data.jsonl, line 1, to .*data.jsonl, line 9, being tokenised"
    with pytest.raises(ValueError, match=place):
        build(path, tmp_path / "cache", template=template)


def test_errors_of_the_child_are_those_of_the_work():
    def work(place, send):
        send(b"three")
        place.set("x" * 10_000)
        raise FileNotFoundError("no such thing")

    child = Child(work)
    assert child.receive() == b"three"
    with pytest.raises(FileNotFoundError, match="no such thing"):
        child.receive()
    child.stop()

    def odd(place, send):
        raise UnicodeDecodeError("utf-8", b"x", 0, 1, "odd")

    child = Child(odd)
    with pytest.raises(RuntimeError, match=re.escape("UnicodeDecodeError: 'utf-8'")):
        child.receive()
    child.stop()


def test_chunks_come_in_order_whoever_is_slow():
    def encode(chunk, place):
        time.sleep(0.02 * (chunk % 3))
        return str(chunk).encode()

    for workers in (1, 2, 5):
        found = list(in_order(lambda place: iter(range(20)), encode, workers))
        assert found == [str(i).encode() for i in range(20)]
        assert list(in_order(lambda place: iter(()), encode, workers)) == []


def test_no_more_is_read_than_is_asked_for():
    read = multiprocessing.get_context("fork").Value("i", 0)

    def numbers(place):
        for number in range(1000):
            read.value = number
            yield number

    found = in_order(numbers, lambda chunk, place: b"x", 2)
    next(found)
    time.sleep(0.3)
    assert read.value <= 2 * AHEAD + 2
    found.close()


@pytest.mark.parametrize("who", ["reader", "worker"])
def test_a_killed_process_ends_all_others(who, tmp_path):
    def note():
        (tmp_path / str(os.getpid())).touch()

    def numbers(place):
        note()
        place.set("the rows")
        for number in range(1000):
            if who == "reader" and number == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            yield number

    def encode(chunk, place):
        note()
        place.set(f"row {chunk}")
        if who == "worker" and chunk == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return b""

    place = "the rows" if who == "reader" else "row 5"
    with pytest.raises(ValueError, match=rf"died \(SIGKILL\) at {place}: .*memory runs out"):
        list(in_order(numbers, encode, 3))
    assert not [pid for pid in os.listdir(tmp_path) if Path("/proc", pid).exists()]


def test_a_child_does_not_outlive_its_parent(tmp_path):
    script = (
        "import os, sys, signal\n"
        "from slap_ds.data.guard import Child\n"
        "def work(place, send):\n"
        "    open(sys.argv[1], 'w').write(str(os.getpid())); send(b''); signal.pause()\n"
        "Child(work).receive(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "pid")], cwd=root, timeout=60, check=False
    )
    child = Path("/proc") / (tmp_path / "pid").read_text()
    for _ in range(200):
        if not child.exists() or "Z" in (child / "stat").read_text().split()[2]:
            return
        time.sleep(0.02)
    pytest.fail("the child is still there")
