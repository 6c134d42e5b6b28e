"""Checks the demo conversations and their tokenizer.

`python tests/data/test_demo_data.py` prints the table of counts that the data's README shows.
"""

from __future__ import annotations

import difflib
import json
import runpy
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "slap_ds" / "data" / "demo"
TASKS = {"qa", "translation", "dialogue", "general"}
LANGS = {"en", "zh", "en-zh", "zh-en"}
SPLITS = ("train", "eval")
# Two user texts with the same answers are near duplicates from this similarity on.
NEAR = 0.8


@cache
def rows(split: str) -> tuple[dict[str, Any], ...]:
    """Read one split."""
    text = (DEMO / f"{split}.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return tuple(json.loads(line) for line in text.removesuffix("\n").split("\n"))


def said(row: dict[str, Any], role: str) -> tuple[str, ...]:
    """All messages of one role, in order."""
    return tuple(m["content"] for m in row["messages"] if m["role"] == role)


def plain(text: str) -> str:
    """The letters and digits of a text only, in lower case."""
    return "".join(c for c in text.casefold() if c.isalnum() or c in "+-")


def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether the user texts differ by no more than a few characters."""
    one, other = "\n".join(said(a, "user")), "\n".join(said(b, "user"))
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio() >= NEAR


def duplicates(data: tuple[dict[str, Any], ...]) -> tuple[int, int]:
    """How many rows repeat an earlier row exactly, and how many nearly."""
    distinct: dict[str, dict[str, Any]] = {}
    for row in data:
        distinct.setdefault(json.dumps(row["messages"]), row)
    # Only rows with the same answers are compared: that is quick, and sums stay apart.
    families: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    near = 0
    for row in distinct.values():
        family = families.setdefault(said(row, "assistant"), [])
        near += any(alike(row, other) for other in family)
        family.append(row)
    return len(data) - len(distinct), near


def multi_turn(data: tuple[dict[str, Any], ...]) -> int:
    """How many rows have more than one user turn."""
    return sum(len(said(row, "user")) > 1 for row in data)


def table() -> str:
    """The counts as the README shows them."""
    lines = ["| | train | eval |", "|---|---:|---:|"]

    def line(name: str, train: int, evaluation: int) -> None:
        lines.append(f"| {name} | {train} | {evaluation} |")

    train, evaluation = rows("train"), rows("eval")
    (train_exact, train_near), (eval_exact, eval_near) = duplicates(train), duplicates(evaluation)
    line("rows", len(train), len(evaluation))
    line("exact duplicates", train_exact, eval_exact)
    line("near duplicates", train_near, eval_near)
    line("several user turns", multi_turn(train), multi_turn(evaluation))
    systems = [sum(bool(said(row, "system")) for row in data) for data in (train, evaluation)]
    line("with a system message", *systems)
    counts = [Counter((row["task"], row["lang"]) for row in data) for data in (train, evaluation)]
    for key in sorted(counts[0] | counts[1]):
        line(" ".join(key), counts[0][key], counts[1][key])
    return "\n".join(lines)


@cache
def tokenizer() -> Any:
    """The shipped tokenizer, loaded as a user loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


@pytest.mark.parametrize(("split", "least"), [("train", 360), ("eval", 72)])
def test_counts_tasks_and_languages(split: str, least: int) -> None:
    data = rows(split)
    assert len(data) >= least
    assert (DEMO / f"{split}.jsonl").stat().st_size < 300_000
    assert {row["task"] for row in data} == TASKS
    assert {row["lang"] for row in data} == LANGS
    pairs = Counter((row["task"], row["lang"]) for row in data)
    assert min(pairs.values()) >= 8
    for task in TASKS - {"translation"}:
        assert pairs[task, "en"]
        assert pairs[task, "zh"]
    assert pairs["translation", "en-zh"]
    assert pairs["translation", "zh-en"]
    assert 0.17 <= multi_turn(data) / len(data) <= 0.25
    assert sum(bool(said(row, "system")) for row in data) >= 4


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_well_formed(split: str) -> None:
    for row in rows(split):
        assert list(row) == ["id", "task", "lang", "source", "messages"]
        assert row["source"] == f"demo_{row['task']}"
        assert row["id"].startswith(f"{row['task']}-{row['lang']}-")
        roles = [m["role"] for m in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert 1 <= len(turns) // 2 <= 4
        for message in row["messages"]:
            assert set(message) == {"role", "content"}
            assert message["content"] == message["content"].strip() != ""


def test_ids_are_unique_over_both_splits() -> None:
    ids = [row["id"] for split in SPLITS for row in rows(split)]
    assert len(ids) == len(set(ids))


def test_shares_of_duplicates() -> None:
    exact, near = duplicates(rows("train"))
    total = len(rows("train"))
    assert 0.10 <= exact / total <= 0.14
    assert 0.13 <= near / total <= 0.17
    assert duplicates(rows("eval")) == (0, 0)


def test_answer_lengths_vary() -> None:
    # Chinese has no spaces, so characters are counted, not words.
    lengths = sorted(len(text) for row in rows("train") for text in said(row, "assistant"))
    assert lengths[len(lengths) // 10] < 15
    assert lengths[-1] > 500


def test_eval_prompts_are_not_in_train() -> None:
    train = rows("train")
    # The opening decides: even a shared first turn would give part of the answer away.
    assert not {plain(said(r, "user")[0]) for r in train} & {
        plain(said(r, "user")[0]) for r in rows("eval")
    }
    families: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in train:
        families.setdefault(said(row, "assistant"), []).append(row)
    for row in rows("eval"):
        assert not any(alike(row, other) for other in families.get(said(row, "assistant"), []))


def test_readme_shows_the_counts() -> None:
    assert table() in (DEMO / "README.md").read_text(encoding="utf-8")


def test_tokenizer_special_tokens() -> None:
    tok = tokenizer()
    assert len(tok) == 2048
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tok.convert_tokens_to_ids(special) == [0, 1, 2]
    assert (tok.pad_token_id, tok.eos_token_id) == (0, 2)
    assert tok.unk_token_id is None


def test_tokenizer_round_trips_every_message() -> None:
    tok = tokenizer()
    odd = ["\x00\t\n  two  spaces ", "ñ Ж 한 🙂 \u2028", "".join(map(chr, range(32, 256)))]
    texts = [m["content"] for split in SPLITS for row in rows(split) for m in row["messages"]]
    for text in [*texts, *odd]:
        ids = tok.encode(text, add_special_tokens=False)
        assert tok.decode(ids, skip_special_tokens=False) == text
        # Plain text never yields a special token.
        assert min(ids) >= 3


@pytest.mark.parametrize("split", SPLITS)
def test_chat_template(split: str) -> None:
    tok = tokenizer()
    for row in rows(split):
        expected = "".join(
            f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["messages"]
        )
        assert tok.apply_chat_template(row["messages"], tokenize=False) == expected
    messages = rows(split)[0]["messages"][:-1]
    opened = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opened.endswith("<|im_end|>\n<|im_start|>assistant\n")
    ids = tok.encode(opened, add_special_tokens=False)
    assert ids.count(1) == len(messages) + 1
    assert ids.count(2) == len(messages)


def test_script_makes_the_same_tokenizer(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "examples" / "make_demo_tokenizer.py"))
    script["write_files"](DEMO / "train.jsonl", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()


if __name__ == "__main__":
    print(table())
