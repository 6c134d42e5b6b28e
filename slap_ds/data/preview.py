"""The first samples as the model will see them: token ids and text, with the trained part marked.

    store -> spans of equal mask -> coloured ids, coloured text -> counts

Colour alone would be lost in a log file, so trained tokens also stand between TRAINED marks, and
the token that ends an answer is written out with its name and id.
"""

import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from slap_ds.data.store import Sample, TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = "cyan"
TRAINED = "bold green"
STOP = "bold white on dark_green"
TRAINED_MARKS = ("⟦", "⟧")


def preview(
    store: TokenStore, tokenizer: "PreTrainedTokenizerBase", count: int, console: Console
) -> None:
    """Print the first `count` samples, then what became of all rows.

    Raises ValueError if one of them has no supervised token.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    begin, end = TRAINED_MARKS
    console.print(
        Text.assemble(
            "prompt ", ("in this colour", PROMPT), f", trained {begin}", ("in this", TRAINED), end
        )
    )
    for index in range(min(count, len(store))):
        sample = store[index]
        labels = ", ".join(
            f"{kind} {store.names[kind][getattr(store, kind)[index]] or '-'}"
            for kind in ("task", "source", "lang")
        )
        supervised = int(sample.mask[1:].sum())
        console.print()
        title = (
            f"sample {index + 1} of {len(store)}: {len(sample.ids)} tokens,"
            f" {supervised} supervised; {labels}"
        )
        console.print(Text(_visible(title), style="bold"), soft_wrap=True)
        _print(console, "ids ", _ids(sample))
        _print(console, "text", _text(sample, tokenizer, special))
        if supervised == 0:
            raise ValueError(
                f"sample {index + 1} has no supervised tokens, so it would teach nothing: check its"
                " roles, the template and max_tokens"
            )
    console.print()
    _print_counts(store, console)


def _print(console: Console, title: str, text: Text) -> None:
    # Without soft_wrap, rich would break ids and words at the width of a log file's terminal.
    console.print(Text.assemble((f"{title} ", "dim"), text), soft_wrap=True)


def _spans(sample: Sample) -> Iterator[tuple[list[int], bool]]:
    """Runs of tokens that are all trained or all not, in order."""
    edges = [0, *(np.flatnonzero(np.diff(sample.mask)) + 1).tolist(), len(sample.ids)]
    for start, stop in pairwise(edges):
        yield sample.ids[start:stop].tolist(), bool(sample.mask[start])


def _ids(sample: Sample) -> Text:
    begin, end = TRAINED_MARKS
    text = Text()
    for ids, trained in _spans(sample):
        numbers = " ".join(str(i) for i in ids)
        text.append(
            f"{begin}{numbers}{end} " if trained else f"{numbers} ", TRAINED if trained else PROMPT
        )
    return text


def _text(sample: Sample, tokenizer: "PreTrainedTokenizerBase", special: set[int]) -> Text:
    begin, end = TRAINED_MARKS
    text = Text()
    for ids, trained in _spans(sample):
        if not trained:
            text.append(_decode(ids, tokenizer), PROMPT)
            continue
        # A template may mark white space after the stop token too.
        last = next((n for n in range(len(ids) - 1, -1, -1) if ids[n] in special), len(ids))
        rest = _decode(ids[last + 1 :], tokenizer)
        text.append(begin + _decode(ids[:last], tokenizer), TRAINED)
        if last < len(ids) and not rest.strip():
            text.append(f"<stop: {_decode(ids[last : last + 1], tokenizer)} = {ids[last]}>", STOP)
            text.append(rest, TRAINED)
        else:
            text.append(_decode(ids[last:], tokenizer), TRAINED)
            text.append("<cut before its stop token>", STOP)
        text.append(end, TRAINED)
    return text


def _decode(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return _visible(text)


def _visible(text: str) -> str:
    """Text with its control characters written out: data must not steer the terminal."""
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        f"\\u{ord(c):04x}" if unicodedata.category(c) in hidden and c not in "\n\t" else c
        for c in text
    )


def _print_counts(store: TokenStore, console: Console) -> None:
    counts = store.counts
    lines = {
        "rows read": counts.rows,
        "rejected": counts.rejected,
        "dropped, too long": counts.dropped_too_long,
        "dropped, no supervised tokens": counts.dropped_no_trained_tokens,
        "samples": len(store),
        "of them truncated": counts.truncated,
        "tokens": counts.tokens,
        "supervised tokens": counts.trained_tokens,
    }
    if counts.context_turns:
        lines["answers left as context"] = counts.context_turns
    if counts.with_media:
        lines["with images or the like"] = counts.with_media
    for name, value in lines.items():
        console.print(Text(f"{name:30}{value:>14,}"), soft_wrap=True)
    if counts.rejected:
        console.print(
            Text(f"rejected rows, with reasons: {store.folder / 'rejects.jsonl'}"), soft_wrap=True
        )
