"""The token store: what it holds, what it leaves out, and that its cache can be trusted."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slap_ds.data.store as store_module
from slap_ds.data.encoding import Encoded, Template
from slap_ds.data.formats import Message
from slap_ds.data.store import Counts, TokenStore, build_store
from slap_ds.data.templates import make_template
from tests.small_tokenizers import (
    CHATML,
    DATA_DIR,
    LLAMA2,
    byte_tokenizer,
    needs_data,
    real_tokenizer,
)

TEMPLATE = make_template("chatml", byte_tokenizer(CHATML))
# Tokens around one question and one answer of a letter each, one token a byte:
# <|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n  a<|im_end|>  \n
PROMPT = 1 + 5 + 1 + 1 + 1 + 1 + 10
LENGTH = PROMPT + 2 + 1


def row(question: str, answer: str, **labels: object) -> dict[str, object]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **labels}


def write(path: Path, rows: Sequence[object]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(r)}\n" for r in rows), "utf-8")
    return str(path)


def build(path: str, cache: Path, **changes: Any) -> TokenStore:
    options: dict[str, Any] = {
        "format": "auto",
        "template": TEMPLATE,
        "max_tokens": 4096,
        "over_length": "truncate",
        "cache_dir": cache,
    }
    return build_store([path], **{**options, **changes})


ROWS = [
    row("q", "a", task="qa", source="book", lang="en"),
    row("问", "答", task="chat", lang="zh"),
    row("q", "a", task="qa", source="other", lang="en"),
]


class Broken(Template):
    """A template that fails the test if anything is tokenised, or dies at the second batch."""

    def __init__(self, batches: int) -> None:
        super().__init__("broken", "", byte_tokenizer(CHATML))
        self.batches = batches

    def fingerprint(self) -> str:
        return TEMPLATE.fingerprint()

    def encode_batch(
        self, conversations: Sequence[Sequence[Message]]
    ) -> list[Encoded | ValueError]:
        if self.batches == 0:
            raise RuntimeError("tokenised")
        self.batches -= 1
        return TEMPLATE.encode_batch(conversations)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        return TEMPLATE.encode_prompt(messages)


def test_a_store_holds_what_the_template_gives(tmp_path: Path) -> None:
    store = build(write(tmp_path / "data.jsonl", ROWS), tmp_path / "cache")
    assert len(store) == 3
    for index, (question, answer) in enumerate((("q", "a"), ("问", "答"), ("q", "a"))):
        expected = TEMPLATE.encode((Message("user", question), Message("assistant", answer)))
        sample = store[index]
        assert sample.ids.dtype == np.int32
        assert sample.mask.dtype == np.bool_
        assert sample.ids.tolist() == expected.ids
        assert sample.mask.tolist() == expected.mask
    assert store.lengths.tolist() == [LENGTH, LENGTH + 4, LENGTH]
    assert store.trained_tokens.tolist() == [2, 4, 2]
    assert store.counts == Counts(rows=3, tokens=3 * LENGTH + 4, trained_tokens=8)
    assert store.names == {
        "task": ["qa", "chat"],
        "source": ["book", "data", "other"],
        "lang": ["en", "zh"],
    }
    assert (store.task.tolist(), store.source.tolist()) == ([0, 1, 0], [0, 1, 2])
    for array in (store.lengths, store.trained_tokens, store.content, store.sample_ids):
        assert array.dtype == np.int64
        assert (array >= 0).all()
    assert store.task.dtype == store.source.dtype == store.lang.dtype == np.int32
    assert store.content[0] == store.content[2] != store.content[1]
    assert (store.sample_ids & (2**28 - 1)).tolist() == [0, 1, 2]
    assert (store.sample_ids >> 28).tolist() == (store.content >> 28).tolist()
    for index in (3, -1):
        with pytest.raises(IndexError):
            store[index]


def test_a_store_is_read_only(tmp_path: Path) -> None:
    store = build(write(tmp_path / "data.jsonl", ROWS), tmp_path / "cache")
    for array in (store.lengths, store.content, store.task, store[0].mask):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_content_differs_where_only_the_mask_does(tmp_path: Path) -> None:
    class Half(Broken):
        def encode_batch(
            self, conversations: Sequence[Sequence[Message]]
        ) -> list[Encoded | ValueError]:
            masks = ([False, True, True], [False, False, True], [False, True, True])
            return [Encoded([7, 8, 9], mask) for mask in masks]

    path = write(tmp_path / "data.jsonl", ROWS)
    content = build(path, tmp_path / "cache", template=Half(1)).content.tolist()
    assert content[0] == content[2] != content[1]


def test_a_first_token_is_never_predicted(tmp_path: Path) -> None:
    class First(Broken):
        def encode_batch(
            self, conversations: Sequence[Sequence[Message]]
        ) -> list[Encoded | ValueError]:
            masks = ([True, True, False], [True, False, False], [False, False, True])
            return [Encoded([7, 8, 9], mask) for mask in masks]

    path = write(tmp_path / "data.jsonl", ROWS)
    store = build(path, tmp_path / "cache", template=First(1))
    assert store.trained_tokens.tolist() == [1, 1]
    assert store.counts.trained_tokens == 2
    assert store.counts.dropped_no_trained_tokens == 1


def test_big_vocabularies_keep_their_ids(tmp_path: Path) -> None:
    class Big(Broken):
        def __init__(self, vocab_size: int) -> None:
            super().__init__(0)
            self.vocab_size = vocab_size

        def fingerprint(self) -> str:
            return str(self.vocab_size)

        def encode_batch(
            self, conversations: Sequence[Sequence[Message]]
        ) -> list[Encoded | ValueError]:
            return [Encoded([0, self.vocab_size - 1], [False, True]) for _ in conversations]

    path = write(tmp_path / "data.jsonl", ROWS)
    for vocab_size, width in ((2**16, 2), (2**16 + 1, 4), (256_000, 4)):
        store = build(path, tmp_path / "cache", template=Big(vocab_size))
        assert store[1].ids.tolist() == [0, vocab_size - 1]
        assert (store.folder / "tokens.bin").stat().st_size == 3 * 2 * width


def test_over_long_samples_are_cut_or_dropped_and_counted(tmp_path: Path) -> None:
    rows = [row("q", "a"), row("q", "a" * 11), row("q" * 9, "a" * 50), row("q" * 10, "a")]
    path = write(tmp_path / "data.jsonl", rows)
    cut = build(path, tmp_path / "cache", max_tokens=PROMPT + 9)
    # The third keeps the one token of its answer that fits, the fourth has none within the length.
    assert cut.lengths.tolist() == [LENGTH, PROMPT + 9, PROMPT + 9]
    assert cut.trained_tokens.tolist() == [2, 9, 1]
    assert cut.counts == Counts(
        rows=4,
        truncated=2,
        dropped_no_trained_tokens=1,
        tokens=int(cut.lengths.sum()),
        trained_tokens=12,
    )
    dropped = build(path, tmp_path / "cache", max_tokens=PROMPT + 13, over_length="drop")
    assert dropped.lengths.tolist() == [LENGTH, PROMPT + 13, PROMPT + 12]
    assert dropped.counts.dropped_too_long == 1
    assert dropped.counts.truncated == dropped.counts.dropped_no_trained_tokens == 0


@pytest.mark.fault_row(17)
def test_bad_rows_are_written_down_with_file_line_and_reason(tmp_path: Path) -> None:
    rows = [*ROWS * 6, row("[INST]", "a"), {"x": 1}, row("q", "")]
    path = write(tmp_path / "data.jsonl", rows)
    template = make_template("llama2", byte_tokenizer(LLAMA2))
    copy = tmp_path / "run" / "rejects.jsonl"
    options = {"template": template, "max_reject_share": 0.2, "rejects_path": copy}
    for _ in ("built", "from the cache"):
        store = build(path, tmp_path / "cache", **options)
        found = [json.loads(line) for line in copy.read_text("utf-8").splitlines()]
        assert [(r["file"], r["line"]) for r in found] == [(path, 19), (path, 20), (path, 21)]
        assert "[INST]" in found[0]["reason"]
        assert "found the fields x" in found[1]["reason"]
        assert "message 2: 'content' is empty" in found[2]["reason"]
        assert (store.counts.rows, store.counts.rejected, len(store)) == (21, 3, 18)
        copy.unlink()
        with pytest.raises(ValueError, match=r"3 of 21 rows cannot .* 0.1 .* line 19: message 1"):
            build(path, tmp_path / "cache", **{**options, "max_reject_share": 0.1})
        assert copy.is_file()
        copy.unlink()


def test_reasons_with_odd_characters_can_be_written(tmp_path: Path) -> None:
    bad = [{"messages": [{"role": "\u2028问", "content": "x"}, {"role": "user", "content": "x"}]}]
    path = write(tmp_path / "问\udcff.jsonl", [*bad, *ROWS])
    store = build(path, tmp_path / "cache", max_reject_share=0.5)
    (line,) = (store.folder / "rejects.jsonl").read_text("utf-8").split("\n")[:-1]
    assert json.loads(line)["file"] == path


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "the data set is empty: no rows in .*data.jsonl"),
        (
            [row("q", "")],
            {"max_reject_share": 1.0},
            "no supervised tokens: .* 1 cannot be used; .*",
        ),
        ([row("q", "a")], {"max_tokens": 9}, "no supervised tokens: .* 1 have no answer within"),
        (
            [row("q", "a")],
            {"max_tokens": 9, "over_length": "drop"},
            "of 1 rows 1 are longer than max_tokens = 9",
        ),
        ([row("q", "a")], {"max_tokens": 1}, "max_tokens is 1: expected 2 or more"),
        ([row("q", "a")], {"over_length": "split"}, "'split': expected truncate or drop"),
        ([row("q", "a")], {"format": "csv"}, "unknown data format 'csv'"),
    ],
)
def test_nothing_to_train_on_is_an_error(
    rows: list[object], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "data.jsonl", rows)
    for _ in ("built", "from the cache"):
        with pytest.raises(ValueError, match=message):
            build(path, tmp_path / "cache", **options)


def test_missing_data_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        build(str(tmp_path / "nothing.jsonl"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


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
    monkeypatch.setattr(store_module, "STORE_VERSION", 2)
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
    assert "damaged and will be built again" in caplog.text
    assert (again.fingerprint, again[1].ids.tolist()) == (fingerprint, ids)
    assert os.listdir(tmp_path / "cache") == [again.folder.name]
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
    assert os.listdir(tmp_path / "cache") == []
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
    (left,) = os.listdir(cache)
    assert left.startswith(".building-")
    store = build(path, cache)
    assert len(store) == 1200
    assert sorted(os.listdir(cache)) == sorted([left, store.folder.name])


THREADED = """
import os, sys
from pathlib import Path
from slap_ds.data import store
from slap_ds.data.formats import Message
from slap_ds.data.templates import make_template
from slap_ds.models.load import load_tokenizer

template = make_template("auto", load_tokenizer("builtin:demo"))
if sys.argv[1] == "used":
    answer = Message("assistant", "b")
    template.encode_batch([[Message("user", str(i)), answer] for i in range(64)])
write = store._write

def written(*arguments):
    write(*arguments)
    print(len(os.listdir("/proc/self/task")), flush=True)

store._write = written
store.build_store(["builtin:demo/eval"], format="auto", template=template, max_tokens=512,
                  over_length="truncate", cache_dir=Path(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("setting", "before"),
    [("true", "fresh"), ("true", "used"), ("false", "fresh")],
)
def test_threads_of_the_tokenizer_do_not_hang_the_child(
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
    if setting == "false":
        assert int(result.stdout) == 1
    elif before == "fresh" and (os.cpu_count() or 1) > 1:
        assert int(result.stdout) > 1


def test_of_two_builders_the_slower_one_takes_what_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", ROWS)
    faster: list[TokenStore] = []
    before = []

    def build_in_between(rows: int) -> None:
        if not faster:
            faster.append(build(path, tmp_path / "cache"))
            before.append((faster[0].folder / "manifest.json").stat().st_ino)

    slower = build(path, tmp_path / "cache", progress=build_in_between)
    assert slower.folder == faster[0].folder
    assert (slower.folder / "manifest.json").stat().st_ino == before[0]
    assert faster[0][1].ids.tolist() == slower[1].ids.tolist()
    assert os.listdir(tmp_path / "cache") == [slower.folder.name]


def test_progress_counts_rows(tmp_path: Path) -> None:
    seen: list[int] = []
    build(write(tmp_path / "data.jsonl", ROWS * 400), tmp_path / "cache", progress=seen.append)
    assert seen == [512, 1024, 1200]


def test_batches_are_bounded_by_text_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", 100)
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
