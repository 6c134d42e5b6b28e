"""The token store: what it holds, what it leaves out, and that its cache can be trusted."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slap_ds.data.build import build_store
from slap_ds.data.counts import Counts
from slap_ds.data.encoding import Encoded, Template
from slap_ds.data.formats import Message
from slap_ds.data.store import TokenStore
from slap_ds.data.templates import make_template
from tests.small_tokenizers import (
    CHATML,
    LLAMA2,
    byte_tokenizer,
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


def listed(cache: Path) -> list[str]:
    """What is in the cache, beside the hashes of old files."""
    return sorted(set(os.listdir(cache)) - {"hashes.jsonl"})


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
    assert (store.file.tolist(), store.line.tolist()) == ([0, 0, 0], [1, 2, 3])
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
