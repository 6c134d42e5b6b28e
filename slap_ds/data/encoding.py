"""From a conversation written as text to token ids and a loss mask: what every template shares.

    text with the spans of its answers -> one encoding -> ids, mask

Special tokens in the text are found again among the ids, one by one. That tells where an answer
stops; it begins as many tokens behind the special token before it as its header has.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from slap_ds.data.formats import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEADERS = 4096  # encoded headers that are remembered


@dataclass(frozen=True, slots=True)
class Encoded:
    """ids: token ids; mask: same length, True where the token is trained (predicted with loss);
    context_turns: answers that should be trained and are not, because the template writes them
    otherwise than when they are generated."""

    ids: list[int]
    mask: list[bool]
    context_turns: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation as text; `spans` are the characters of its trained answers, from where the
    prompt ends to the end of the special token that stops the answer."""

    text: str
    spans: tuple[tuple[int, int], ...]
    context_turns: int = 0


class Template(ABC):
    """Writes conversations as token ids for one tokenizer. Made by `make_template`.

    `stop_ids` end an answer in training, so generation should stop at them; `vocab_size` is one
    more than the highest token id; `chat_template` is the Jinja to save with the tokenizer;
    `notes` are lines for the user about what this template does with conversations.
    """

    name: str
    chat_template: str
    jinja: str  # the same, with what it writes of today fixed
    stop_ids: tuple[int, ...]
    vocab_size: int
    notes: tuple[str, ...] = ()
    in_parts: bool = False  # whether the Jinja takes contents as lists of parts

    def __init__(
        self,
        name: str,
        chat_template: str,
        tokenizer: "PreTrainedTokenizerBase",
        control: Collection[str] = (),
    ) -> None:
        self.name = name
        self.chat_template = self.jinja = chat_template
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self._tokenizer = tokenizer
        known = {**tokenizer.get_added_vocab(), **special_tokens(tokenizer)}
        self._special_id = special_tokens(tokenizer)
        # What text must not hold where special tokens are recognised.
        self._any_special = _any_of({*self._special_id, *control})
        # The token for unknown characters comes of plain text, and is no control token (unless one
        # token serves as both, as in tokenizers that never meet an unknown character).
        if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            self._special_id = {
                t: i for t, i in self._special_id.items() if i != tokenizer.unk_token_id
            }
        self._special_id |= {token: known[token] for token in control if token in known}
        self._special_ids = set(self._special_id.values())
        self._special = _any_of(self._special_id)
        self._headers: dict[str, list[int]] = {}

    @abstractmethod
    def encode_batch(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[str] = ()
    ) -> list[Encoded | ValueError]:
        """One result a conversation: encoded, or why the template cannot write it.

        Args:
            tools: of each conversation, those that it offers (a JSON list as text); empty: none.
        """

    @abstractmethod
    def encode_prompt(
        self, messages: Sequence[Message], tools: str = "", answer: Message | None = None
    ) -> list[int]:
        """Ids up to where the answer to `messages` begins. Raises ValueError as `encode`.

        Args:
            answer: the one that is expected; templates write another prompt before an answer that
                begins with reasoning. Default: one without.
        """

    def encode(self, messages: Sequence[Message], tools: str = "") -> Encoded:
        """Raises ValueError where the template cannot write the conversation."""
        (result,) = self.encode_batch([messages], [tools])
        if isinstance(result, ValueError):
            raise result
        return result

    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides the ids: the template and the tokenizer."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        parts = [self.name, self.chat_template, describe(self._tokenizer)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _tokenise(self, texts: Collection[str], *, as_text: bool) -> dict[str, list[int]]:
        """Ids of each text; with `as_text`, special tokens in it are not recognised."""
        if not texts:
            return {}
        found = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=as_text,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return dict(zip(texts, found["input_ids"], strict=True))

    def _marked(self, batch: Sequence[Written]) -> list[Encoded | ValueError]:
        """Each text encoded as a whole, special tokens in it recognised, its spans trained."""
        marks = [list(self._special.finditer(written.text)) for written in batch]
        heads = [
            [_head(w.text, m, begin) for begin, _ in w.spans]
            for w, m in zip(batch, marks, strict=True)
        ]
        self._remember(head for row in heads for _, head in row)
        texts = dict.fromkeys(written.text for written in batch)
        ids_of = self._tokenise(texts, as_text=False)
        rows = zip(batch, marks, heads, strict=True)
        return [self._mark(w, m, h, ids_of[w.text]) for w, m, h in rows]

    def _remember(self, heads: Iterable[str]) -> None:
        new = {head: None for head in heads if head not in self._headers}
        if len(self._headers) + len(new) > _HEADERS:
            self._headers.clear()
        self._headers |= self._tokenise(new, as_text=False)

    def _mark(
        self,
        written: Written,
        marks: Sequence[re.Match[str]],
        heads: Sequence[tuple[int, str]],
        ids: list[int],
    ) -> Encoded | ValueError:
        expected = [self._special_id[mark[0]] for mark in marks]
        at = [index for index, i in enumerate(ids) if i in self._special_ids]
        if [ids[index] for index in at] != expected:
            return ValueError("the tokenizer finds other special tokens than the template wrote")
        cuts = [
            begin
            for (begin, _), (count, head) in zip(written.spans, heads, strict=True)
            if (start := at[count - 1] if count else 0) is not None
            and ids[start : start + len(self._header(head))] != self._header(head)
        ]
        if cuts:
            # An answer's first characters merged with the text before it (a newline after a
            # newline). In use that text is the end of the prompt, so the answer is encoded apart.
            edges = [0, *cuts, len(written.text)]
            ids = self._header(written.text[: edges[1]]) + [
                i for a, b in pairwise(edges[1:]) for i in self._continuation(written.text[a:b])
            ]
            at = [index for index, i in enumerate(ids) if i in self._special_ids]
        mask = [False] * len(ids)
        ends = [mark.end() for mark in marks]
        for (_, end), (count, head) in zip(written.spans, heads, strict=True):
            begin = (at[count - 1] if count else 0) + len(self._header(head))
            last = bisect_right(ends, end) - 1
            stop = at[last] + 1
            if end > ends[last]:  # white space after the stop, which the template marks as well
                stop += len(self._header(written.text[marks[last].start() : end])) - 1
            mask[begin:stop] = [True] * (stop - begin)
        return Encoded(ids, mask, written.context_turns)

    def _header(self, text: str) -> list[int]:
        if text not in self._headers:
            self._remember([text])
        return self._headers[text]

    def _continuation(self, text: str) -> list[int]:
        """Ids of a text that does not begin a document."""
        anchor = self._anchor
        return self._tokenise([anchor + text], as_text=False)[anchor + text][bool(anchor) :]

    @cached_property
    def _anchor(self) -> str:
        """A special token that leaves the text after it as it is."""
        return next((token for token in self._special_id if not self._strips(token)), "")

    def _strips(self, token: str) -> bool:
        added = self._tokenizer.added_tokens_decoder.get(self._special_id[token])
        return bool(added is not None and (added.rstrip or added.lstrip))


def _head(text: str, marks: Sequence[re.Match[str]], begin: int) -> tuple[int, str]:
    """What stands directly before an answer: how many special tokens come before it, and the text
    from the last of them on."""
    count = bisect_right(marks, begin, key=re.Match.end)
    return count, text[marks[count - 1].start() if count else 0 : begin]


def encode_talks(template: Template, talks: Sequence[Conversation]) -> list[Encoded | ValueError]:
    """One result a conversation, as `Template.encode_batch`."""
    messages, tools = [talk.messages for talk in talks], [talk.tools for talk in talks]
    return template.encode_batch(messages, tools) if any(tools) else template.encode_batch(messages)


def check_prompt(messages: Sequence[Message]) -> None:
    """Raises ValueError where `messages` leave nothing to answer."""
    if not messages or messages[-1].role == "assistant":
        raise ValueError("a prompt must end with a message to answer, not with an answer")


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """The tokenizer's special tokens with their ids."""
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {**added, **dict(named)}


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    ordered = sorted(tokens, key=len, reverse=True)
    # No tokens: a pattern that matches nothing.
    return re.compile("|".join(re.escape(token) for token in ordered) or r"(?!)")


def describe(tokenizer: "PreTrainedTokenizerBase") -> str:
    """All of a tokenizer that decides ids, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # What the last caller asked of it, not what it is.
        del state["truncation"], state["padding"]
    else:
        state = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    special = sorted(special_tokens(tokenizer).items())
    return json.dumps([state, special, tokenizer.special_tokens_map], sort_keys=True)
