"""The preview: what is trained must be seen, with colour and without."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from slap_ds.data.build import build_store
from slap_ds.data.preview import preview
from slap_ds.data.store import Sample, TokenStore
from slap_ds.data.templates import make_template
from tests.small_tokenizers import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer(CHATML)


def store_of(tmp_path: Path, *turns: tuple[str, str], max_tokens: int = 4096) -> TokenStore:
    rows = [
        {
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}],
            "task": "qa",
        }
        for q, a in turns
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, 3]), "utf-8")
    return build_store(
        [str(path)],
        format="auto",
        template=make_template("chatml", TOKENIZER),
        max_tokens=max_tokens,
        over_length="truncate",
        cache_dir=tmp_path / "cache",
        max_reject_share=0.5,
    )


def shown(store: TokenStore, count: int, *, colour: bool = False) -> str:
    file = io.StringIO()
    preview(store, TOKENIZER, count, Console(file=file, force_terminal=colour, width=40))
    return file.getvalue()


def test_ids_text_stop_token_and_counts(tmp_path: Path) -> None:
    store = store_of(tmp_path, ("q", "yes"), ("r", "no"))
    lines = shown(store, 1).splitlines()
    ids = [str(i) for i in store[0].ids]
    assert ids[-2] == "2"
    title = "sample 1 of 2: 25 tokens, 4 supervised; task qa, source data, lang -"
    assert lines[2] == title
    trained = " ".join(ids[20:24])
    assert lines[3] == f"ids  {' '.join(ids[:20])} ⟦{trained}⟧ {ids[24]} "
    assert lines[4:7] == [
        "text <|im_start|>user",
        "q<|im_end|>",
        "<|im_start|>assistant",
    ]
    assert lines[7] == "⟦yes<stop: <|im_end|> = 2>⟧"
    counts = {line[:30].strip(): line[30:].strip() for line in lines[9:]}
    assert counts["rows read"] == "3"
    assert counts["rejected"] == "1"
    assert counts["samples"] == "2"
    assert counts["supervised tokens"] == "7"
    assert lines[-1].endswith("rejects.jsonl")


def test_prompt_and_answer_have_different_colours(tmp_path: Path) -> None:
    text = shown(store_of(tmp_path, ("question", "answer")), 1, colour=True)
    assert "\x1b[36mquestion<|im_end|>" in text
    assert "\x1b[1;32m⟦answer" in text
    assert "<stop: <|im_end|> = 2>" in text
    assert "\x1b" not in shown(store_of(tmp_path, ("question", "answer")), 1)


def test_a_cut_answer_is_named(tmp_path: Path) -> None:
    text = shown(store_of(tmp_path, ("q", "a long answer"), max_tokens=26), 1)
    assert "⟦a long<cut before its stop token>⟧" in text


def test_data_cannot_steer_the_terminal_or_use_markup(tmp_path: Path) -> None:
    text = shown(store_of(tmp_path, ("[red]q[/]", "a\x1b[2J\u202eb\u3000c\n\td")), 1)
    assert "[red]q[/]" in text
    assert "⟦a\\u001b[2J\\u202eb\u3000c\n" in text


def test_more_are_asked_for_than_there_are(tmp_path: Path) -> None:
    assert shown(store_of(tmp_path, ("q", "a"), ("r", "b")), 99).count("\nsample ") == 2


def test_a_sample_without_supervised_tokens_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path, ("q", "a"), ("r", "b"))

    def nothing_trained(self: TokenStore, index: int) -> Sample:
        mask = np.zeros(5, dtype=np.bool_)
        mask[0] = True  # which nothing predicts
        return Sample(np.arange(5, dtype=np.int32), mask)

    monkeypatch.setattr(TokenStore, "__getitem__", nothing_trained)
    with pytest.raises(ValueError, match="sample 1 has no supervised tokens"):
        shown(store, 1)
