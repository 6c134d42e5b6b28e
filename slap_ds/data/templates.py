"""From messages to token ids and a loss mask.

    messages -> pieces (control token | text, trained or not) -> ids, mask

A built-in template (`builtin_templates`) says which pieces a conversation is made of. Together they
are encoded as one text, as `apply_chat_template` would; where a text holds a special token of its
own, piece by piece with special tokens switched off, so whatever a user types stays text. The
answer and the stop token of every assistant turn are trained, nothing else.

"auto" takes the built-in template of a ChatGLM or GLM-4 tokenizer, which its control tokens give
away. For others it renders the tokenizer's own chat template (`own_template`), and refuses rows
whose text holds a special token, because there they would become one.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from slap_ds.data import builtin_templates
from slap_ds.data.builtin_templates import Piece
from slap_ds.data.encoding import Encoded, Template, Written, check_prompt, special_tokens
from slap_ds.data.formats import Message
from slap_ds.data.glm_templates import GLM_TEMPLATES, recognise_glm
from slap_ds.data.own_template import OwnTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = {**builtin_templates.TEMPLATES, **GLM_TEMPLATES}


class _BuiltInTemplate(Template):
    def __init__(self, name: str, tokenizer: "PreTrainedTokenizerBase") -> None:
        built_in = TEMPLATES[name]
        super().__init__(name, built_in.chat_template, tokenizer, built_in.control)
        if missing := [token for token in built_in.control if token not in self._special_id]:
            raise ValueError(
                f"template '{name}' needs the special tokens {', '.join(missing)}, which the"
                " tokenizer does not have: name another template, or use a tokenizer that has them"
            )
        self._pieces = built_in.pieces
        self._apart = built_in.apart
        self.stop_ids = tuple(self._special_id[token] for token in built_in.stops)

    def encode_batch(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[str] = ()
    ) -> list[Encoded | ValueError]:
        plans: list[list[Piece] | ValueError] = []
        for messages, offer in zip(conversations, tools or [""] * len(conversations), strict=True):
            try:
                plans.append(list(self._pieces(_plain(self.name, messages, offer), False)))
            except ValueError as error:
                plans.append(error)
        return self._encoded(plans)

    def encode_prompt(
        self, messages: Sequence[Message], tools: str = "", answer: Message | None = None
    ) -> list[int]:
        check_prompt(messages)
        pieces = list(self._pieces(_plain(self.name, messages, tools), True))
        (result,) = self._encoded([pieces])
        if isinstance(result, ValueError):
            raise result
        return result.ids

    def _encoded(self, plans: Sequence[list[Piece] | ValueError]) -> list[Encoded | ValueError]:
        whole = [self._whole(plan) if isinstance(plan, list) else None for plan in plans]
        marked = iter(self._marked([written for written in whole if written is not None]))
        texts: dict[str, None] = {}
        for plan, written in zip(plans, whole, strict=True):
            if isinstance(plan, list) and written is None:
                for before, piece in zip([None, *plan], plan, strict=False):
                    if not piece.control:
                        lead = self._lead(before, piece)
                        texts[lead + piece.text] = texts[lead] = None
        ids = self._tokenise(texts, as_text=True)
        return [
            plan
            if isinstance(plan, ValueError)
            else (self._join(plan, ids) if written is None else next(marked))
            for plan, written in zip(plans, whole, strict=True)
        ]

    def _whole(self, pieces: Sequence[Piece]) -> Written | None:
        """The pieces as one text, or None where its special tokens are not the control pieces."""
        text = "".join(piece.text for piece in pieces)
        control = [piece.text for piece in pieces if piece.control]
        if self._apart or [mark[0] for mark in self._any_special.finditer(text)] != control:
            return None
        spans, place, begin = [], 0, None
        for piece in pieces:
            if piece.trained and begin is None:
                begin = place
            place += len(piece.text)
            if piece.trained and piece.control and begin is not None:
                spans.append((begin, place))
                begin = None
        return Written(text, tuple(spans))

    def _lead(self, before: Piece | None, piece: Piece) -> str:
        """Text that a piece is encoded behind, so that it does not begin a document if it does not
        in the whole."""
        if piece.after or before is None or self._apart:
            return piece.after
        return "" if self._documents_begin else "\n"

    @cached_property
    def _documents_begin(self) -> bool:
        """Whether a text behind a control token is encoded as if it began a document."""
        token, i = next((t, i) for t, i in self._special_id.items() if not self._strips(t))
        return self._tokenise([token + "a"], as_text=False)[token + "a"] == [
            i,
            *self._tokenise(["a"], as_text=True)["a"],
        ]

    def _join(self, pieces: list[Piece], ids_of: dict[str, list[int]]) -> Encoded | ValueError:
        ids: list[int] = []
        mask: list[bool] = []
        for before, piece in zip([None, *pieces], pieces, strict=False):
            if piece.control:
                new = [self._special_id[piece.text]]
            else:
                lead = self._lead(before, piece)
                ahead = ids_of[lead] if lead else []
                new = ids_of[lead + piece.text]
                if new[: len(ahead)] == ahead:
                    new = new[len(ahead) :]
                else:
                    # The piece's first characters merged with the text before it. In use, that
                    # text is the end of the prompt, so it keeps its ids.
                    new = self._tokenise([piece.text], as_text=True)[piece.text]
                if not self._special_ids.isdisjoint(new):
                    return ValueError("the tokenizer makes a control token of the row's text")
            ids += new
            mask += [piece.trained] * len(new)
        return Encoded(ids, mask)


def _plain(name: str, messages: Sequence[Message], tools: str) -> list[Message]:
    """The messages as texts alone.

    Raises ValueError: the built-in template has no form for what else they hold.
    """
    advice = f"which the template '{name}' has no form for: name auto, for the tokenizer's own"
    if tools:
        raise ValueError(f"the row has tools, {advice}")
    found = []
    for number, message in enumerate(messages, 1):
        if message.reasoning:
            raise ValueError(f"message {number} has reasoning beside its text, {advice}")
        if message.calls and (message.content or not all(c.source for c in message.calls)):
            raise ValueError(f"message {number} has calls of tools, {advice}")
        text = "\n".join(call.source for call in message.calls) or message.content
        found.append(replace(message, content=text, calls=()))
    return found


def make_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> Template:
    """The template of that name for a tokenizer; "auto" is ChatGLM's or GLM-4's where the tokenizer
    has their control tokens, else the tokenizer's own chat template.

    Raises ValueError: unknown name, a tokenizer without the special tokens that a built-in needs
    or without a chat template, or a chat template in which the answers cannot be found.
    """
    with _one_thread():
        return _made(name, tokenizer)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Tokenise without threads inside: a process that has used them has none after a fork, and the
    store is built after one."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _made(name: str, tokenizer: "PreTrainedTokenizerBase") -> Template:
    if name in TEMPLATES:
        return _BuiltInTemplate(name, tokenizer)
    built_in = ", ".join(TEMPLATES)
    if name != "auto":
        raise ValueError(f"unknown template {name!r}: expected auto, {built_in}")
    # Their own chat templates end an answer where the next role begins, which cannot be rendered
    # answer by answer. Later GLMs, which think first, have the same tokens and other prompts.
    family = recognise_glm(special_tokens(tokenizer))
    if family is not None and "<think>" not in tokenizer.get_added_vocab():
        return _BuiltInTemplate(family, tokenizer)
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer has no chat template of its own: name a built-in one ({built_in})"
        )
    return OwnTemplate(tokenizer)
