"""Token stores in the cache: reused, rebuilt, and never half-written."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slap_ds.data import build as build_module
from slap_ds.data import parts as parts_module
from slap_ds.data.build import build_store
from slap_ds.data.store import TokenStore
from slap_ds.data.templates import make_template
from tests.data.test_store import ROWS, TEMPLATE, Broken, build, listed, row, write
from tests.small_tokenizers import (
    CHATML,
    DATA_DIR,
    byte_tokenizer,
    needs_data,
    real_tokenizer,
)


def test_the_second_time_nothing_is_tokenised(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", ROWS)
    first = build(path, tmp_path / "cache")
    again = build(path, tmp_path / "cache", template=Broken(0))
    assert (again.folder, again.fingerprint) == (first.folder, first.fingerprint)
    moved = tmp_path / "elsewhere" / "data.jsonl"
    moved.parent.mkdir()
    shutil.copy(path, moved)
    assert build(str(moved), tmp_path / "cache", template=Broken(0)).folder == first.folder


def test_all_that_decides_the_content_decides_the_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", ROWS)
    cache = tmp_path / "cache"
    first = build(path, cache)
    renamed = build(write(tmp_path / "renamed.jsonl", ROWS), cache)
    others = [
        renamed,
        build(path, cache, format="messages"),
        build(path, cache, max_tokens=4095),
        build(path, cache, over_length="drop"),
        build(path, cache, template=make_template("chatml", byte_tokenizer((*CHATML, "<x>")))),
        build(write(tmp_path / "other" / "data.jsonl", [*ROWS, ROWS[0]]), cache),
        build_store(
            [path, path],
            format="auto",
            template=TEMPLATE,
            max_tokens=4096,
            over_length="truncate",
            cache_dir=cache,
        ),
    ]
    assert len({store.folder for store in (first, *others)}) == 8
    # Equal tokens with other labels are other content; equal content under another name is not.
    assert renamed.fingerprint != first.fingerprint
    assert others[1].fingerprint == others[2].fingerprint == first.fingerprint
    assert others[-1].sample_ids.tolist()[:3] == first.sample_ids.tolist()
    assert len(set(others[-1].sample_ids.tolist())) == 6


def test_a_new_store_version_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data.jsonl", ROWS)
    first = build(path, tmp_path / "cache")
    monkeypatch.setattr(build_module, "STORE_VERSION", 2)
    assert build(path, tmp_path / "cache").folder != first.folder


FILES = ("tokens", "mask", "lengths", "trained_tokens", "content", "task", "source", "lang")


@pytest.mark.parametrize("name", [*(f"{name}.bin" for name in FILES), "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "longer", "gone"])
def test_a_damaged_store_is_built_again_and_says_so(
    name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "data.jsonl", ROWS)
    first = build(path, tmp_path / "cache")
    fingerprint, ids = first.fingerprint, first[1].ids.tolist()
    file = first.folder / name
    if damage == "gone":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes(data[:-1] if damage == "cut" else data + b"\x01")
    with caplog.at_level(logging.WARNING):
        again = build(path, tmp_path / "cache")
    assert "damaged and will be rebuilt" in caplog.text
    assert (again.fingerprint, again[1].ids.tolist()) == (fingerprint, ids)
    assert listed(tmp_path / "cache") == [again.folder.name]
    caplog.clear()
    build(path, tmp_path / "cache", template=Broken(0))
    assert not caplog.text


def test_lengths_that_do_not_add_up_are_damage(tmp_path: Path) -> None:
    store = build(write(tmp_path / "data.jsonl", ROWS), tmp_path / "cache")
    np.array([1, 2, 3], dtype="<i8").tofile(store.folder / "lengths.bin")
    with pytest.raises(ValueError, match="do not add up"):
        TokenStore(store.folder)


def test_an_error_while_building_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", ROWS * 400)
    with pytest.raises(RuntimeError, match="tokenised"):
        build(path, tmp_path / "cache", template=Broken(1))
    assert listed(tmp_path / "cache") == []
    assert len(build(path, tmp_path / "cache")) == 1200


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.data.test_store import build
build(sys.argv[1], Path(sys.argv[2]), progress=lambda rows: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_process_killed_while_building_leaves_no_half_store(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", ROWS * 400)
    cache = tmp_path / "cache"
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", KILLED, path, str(cache)], cwd=root, timeout=120, check=False
    )
    assert result.returncode == -signal.SIGKILL
    (left,) = listed(cache)
    assert left.startswith(".building-")
    store = build(path, cache)
    assert len(store) == 1200
    assert listed(cache) == [store.folder.name]


THREADED = """
import os, sys
from pathlib import Path
from slap_ds.data import build
from slap_ds.data.formats import Message
from slap_ds.data.templates import make_template
from slap_ds.models.load import load_tokenizer

template = make_template("auto", load_tokenizer("builtin:demo"))
if sys.argv[1] == "used":
    answer = Message("assistant", "b")
    template.encode_batch([[Message("user", str(i)), answer] for i in range(64)])
encode = build.encode

def encoded(*arguments):
    part = encode(*arguments)
    print(len(os.listdir("/proc/self/task")), flush=True)
    return part

build.encode = encoded
build.build_store(["builtin:demo/eval"], format="auto", template=template, max_tokens=512,
                  over_length="truncate", cache_dir=Path(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("setting", "before"),
    [
        ("true", "used"),
        pytest.param(None, "used", marks=pytest.mark.slow),
        pytest.param("true", "fresh", marks=pytest.mark.slow),
    ],
)
def test_children_tokenise_without_threads(
    setting: str | None, before: str, tmp_path: Path
) -> None:
    """A forked process that waits for threads of its parent's waits for ever."""
    environ = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    if setting is not None:
        environ["TOKENIZERS_PARALLELISM"] = setting
    result = subprocess.run(
        [sys.executable, "-c", THREADED, before, str(tmp_path / "cache")],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    assert set(result.stdout.split()) == {"1"}


def test_progress_counts_rows(tmp_path: Path) -> None:
    seen: list[int] = []
    build(write(tmp_path / "data.jsonl", ROWS * 400), tmp_path / "cache", progress=seen.append)
    assert seen == [512, 1024, 1200]


def test_chunks_are_bounded_by_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "CHUNK_BYTES", 200)
    seen: list[int] = []
    rows = [row("q" * 60, "a")] * 3
    build(write(tmp_path / "data.jsonl", rows), tmp_path / "cache", progress=seen.append)
    assert seen == [2, 3]


@needs_data
def test_real_data(tmp_path: Path) -> None:
    tokenizer = real_tokenizer()
    store = build(
        str(DATA_DIR / "*" / "*.eval.jsonl.gz"),
        tmp_path,
        template=make_template("chatml", tokenizer),
        max_tokens=512,
    )
    counts = store.counts
    assert counts.rejected == 0
    assert counts.rows == len(store) + counts.dropped_no_trained_tokens
    assert counts.tokens == store.lengths.sum()
    assert counts.trained_tokens == store.trained_tokens.sum()
    assert store.lengths.max() == 512
    assert sorted(store.names["task"]) == ["dialogue", "general", "qa", "translation"]
    texts = [tokenizer.decode(store[index].ids) for index in range(len(store))]
    assert all(text.startswith("<|im_start|>") for text in texts)
    # Equal hashes exactly where samples are equal, counted the slow way.
    samples = [store[index] for index in range(len(store))]
    slow = {(sample.ids.tobytes(), sample.mask.tobytes()) for sample in samples}
    assert len(set(store.content.tolist())) == len(slow) <= len(store)
    assert len(set(store.sample_ids.tolist())) == len(store)
    for index in range(0, len(store), 97):
        assert store.trained_tokens[index] == store[index].mask[1:].sum() > 0
