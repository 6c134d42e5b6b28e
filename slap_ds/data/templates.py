"""From messages to token ids and a loss mask.

    messages -> pieces (control token | text, trained or not) -> ids, mask

A built-in template (`builtin_templates`) says which pieces a conversation is made of. A control
token is looked up, never parsed, and text is encoded piece by piece with special tokens switched
off, so whatever a user types stays text. The answer and the stop token of every assistant turn are
trained, nothing else.

"auto" takes the built-in template of a ChatGLM or GLM-4 tokenizer, which its control tokens give
away. For others it renders the tokenizer's own chat template, finds the answers by rendering
prefixes of the conversation, and refuses rows whose text holds a special token, because there they
would become one.
"""

import contextlib
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from slap_ds.data import builtin_templates
from slap_ds.data.builtin_templates import Piece
from slap_ds.data.formats import Message
from slap_ds.data.glm_templates import GLM_TEMPLATES, recognise_glm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = {**builtin_templates.TEMPLATES, **GLM_TEMPLATES}


@dataclass(frozen=True, slots=True)
class Encoded:
    """ids: token ids; mask: same length, True where the token is trained (predicted with loss)."""

    ids: list[int]
    mask: list[bool]


class Template(ABC):
    """Writes conversations as token ids for one tokenizer. Made by `make_template`.

    `stop_ids` end an answer in training, so generation should stop at them; `vocab_size` is one
    more than the highest token id; `chat_template` is the Jinja to save with the tokenizer.
    """

    name: str
    chat_template: str
    stop_ids: tuple[int, ...]
    vocab_size: int

    def __init__(self, name: str, chat_template: str, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.name = name
        self.chat_template = chat_template
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self._tokenizer = tokenizer
        self._special_ids = set(_special_tokens(tokenizer).values())
        # The token for unknown characters comes of plain text, and is no control token (unless one
        # token serves as both, as in tokenizers that never meet an unknown character).
        if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            self._special_ids.discard(tokenizer.unk_token_id)

    @abstractmethod
    def encode_batch(
        self, conversations: Sequence[Sequence[Message]]
    ) -> list[Encoded | ValueError]:
        """One result a conversation: encoded, or why the template cannot write it."""

    @abstractmethod
    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to where the answer to `messages` begins. Raises ValueError as `encode`."""

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Raises ValueError where the template cannot write the conversation."""
        (result,) = self.encode_batch([messages])
        if isinstance(result, ValueError):
            raise result
        return result

    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides the ids: the template and the tokenizer."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        parts = [self.name, self.chat_template, _describe(self._tokenizer)]
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


class _BuiltInTemplate(Template):
    def __init__(self, name: str, tokenizer: "PreTrainedTokenizerBase") -> None:
        built_in = TEMPLATES[name]
        super().__init__(name, built_in.chat_template, tokenizer)
        known = {**tokenizer.get_added_vocab(), **_special_tokens(tokenizer)}
        if missing := [token for token in built_in.control if token not in known]:
            raise ValueError(
                f"template '{name}' needs the special tokens {', '.join(missing)}, which the"
                " tokenizer does not have: name another template, or use a tokenizer that has them"
            )
        self._pieces = built_in.pieces
        self._control = {token: known[token] for token in built_in.control}
        self._forbidden = self._special_ids | set(self._control.values())
        self.stop_ids = tuple(known[token] for token in built_in.stops)

    def encode_batch(
        self, conversations: Sequence[Sequence[Message]]
    ) -> list[Encoded | ValueError]:
        plans: list[list[Piece] | ValueError] = []
        texts: dict[str, None] = {}
        for messages in conversations:
            try:
                pieces = list(self._pieces(messages, False))
            except ValueError as error:
                plans.append(error)
                continue
            plans.append(pieces)
            for piece in pieces:
                if not piece.control:
                    texts[piece.after + piece.text] = texts[piece.after] = None
        ids = self._tokenise(texts, as_text=True)
        return [plan if isinstance(plan, ValueError) else self._join(plan, ids) for plan in plans]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        _check_prompt(messages)
        pieces = list(self._pieces(messages, True))
        texts = {text for p in pieces if not p.control for text in (p.after + p.text, p.after)}
        result = self._join(pieces, self._tokenise(texts, as_text=True))
        if isinstance(result, ValueError):
            raise result
        return result.ids

    def _join(self, pieces: list[Piece], ids_of: dict[str, list[int]]) -> Encoded | ValueError:
        ids: list[int] = []
        mask: list[bool] = []
        for piece in pieces:
            if piece.control:
                new = [self._control[piece.text]]
            else:
                before = ids_of[piece.after] if piece.after else []
                new = ids_of[piece.after + piece.text]
                if new[: len(before)] == before:
                    new = new[len(before) :]
                else:
                    # The piece's first characters merged with the text before it. In use, that
                    # text is the end of the prompt, so it keeps its ids.
                    new = self._tokenise([piece.text], as_text=True)[piece.text]
                if not self._forbidden.isdisjoint(new):
                    return ValueError("the tokenizer makes a control token of the row's text")
            ids += new
            mask += [piece.trained] * len(new)
        return Encoded(ids, mask)


# Some templates write today's date. Rows must be the same tomorrow, so they get Llama 3's own date.
_FIXED_DATE = (
    "{%- macro strftime_now(form) -%}"
    "{{- {'%Y-%m-%d': '2024-07-26', '%d %B %Y': '26 July 2024'}.get(form, '26 Jul 2024') -}}"
    "{%- endmacro -%}"
)
_PROBE = (
    Message("user", "a"),
    Message("assistant", "b"),
    Message("user", "c"),
    Message("assistant", "d"),
)


@dataclass(frozen=True, slots=True)
class _Rendered:
    """text: the conversation; answers: for each assistant turn, where its answer begins in text and
    how many special tokens later it ends."""

    text: str
    answers: list[tuple[int, int]]


class _OwnTemplate(Template):
    """The tokenizer's own chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        source = tokenizer.get_chat_template()
        super().__init__("auto", source, tokenizer)
        self._source = _FIXED_DATE + source if "strftime_now" in source else source
        special = sorted(_special_tokens(tokenizer), key=len, reverse=True)
        # No special tokens: a pattern that matches nothing.
        self._special = re.compile("|".join(re.escape(token) for token in special) or r"(?!)")
        self._skeletons: dict[tuple[str, ...], list[int]] = {}
        encoded = self.encode(_PROBE)
        last = [a and not b for a, b in pairwise([*encoded.mask, False])]
        self.stop_ids = tuple(
            sorted({i for i, ends in zip(encoded.ids, last, strict=True) if ends})
        )

    def encode_batch(
        self, conversations: Sequence[Sequence[Message]]
    ) -> list[Encoded | ValueError]:
        plans: list[_Rendered | ValueError] = []
        texts: dict[str, None] = {}
        for messages in conversations:
            try:
                rendered = self._find_answers(messages)
                self._skeleton(messages)
            except ValueError as error:
                plans.append(error)
                continue
            plans.append(rendered)
            texts[rendered.text] = None
            texts.update((rendered.text[:start], None) for start, _ in rendered.answers)
        ids = self._tokenise(texts, as_text=False)
        return [
            plan
            if isinstance(plan, ValueError)
            else self._mark(plan, ids, self._skeleton(messages))
            for plan, messages in zip(plans, conversations, strict=True)
        ]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        _check_prompt(messages)
        self._refuse_special(messages)
        (text,) = self._render([messages], prompt=True)
        return self._tokenise([text], as_text=False)[text]

    def _render(self, conversations: Sequence[Sequence[Message]], *, prompt: bool) -> list[str]:
        rows = [[{"role": m.role, "content": m.content} for m in c] for c in conversations]
        try:
            texts: list[str] = self._tokenizer.apply_chat_template(
                rows, chat_template=self._source, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ValueError(f"the tokenizer's chat template refuses this: {error}") from error
        return texts

    def _refuse_special(self, messages: Sequence[Message]) -> None:
        for number, message in enumerate(messages, 1):
            if found := self._special.search(message.content):
                raise ValueError(
                    f"message {number} holds {found[0]!r}, which the tokenizer's own chat template"
                    " would turn into a control token; a built-in template"
                    f" ({', '.join(TEMPLATES)}) can keep it as text"
                )

    def _find_answers(self, messages: Sequence[Message]) -> _Rendered:
        self._refuse_special(messages)
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        (text,) = self._render([messages], prompt=False)
        heads = self._render([messages[:turn] for turn in turns], prompt=True) if turns else []
        ends = self._render([messages[: turn + 1] for turn in turns], prompt=False) if turns else []
        answers = []
        for head, end in zip(heads, ends, strict=True):
            if not (text.startswith(end) and end.startswith(head)):
                raise ValueError(
                    "the tokenizer's chat template writes the beginning of a conversation"
                    " differently once it goes on, so the answers cannot be told apart: name a"
                    f" built-in template instead ({', '.join(TEMPLATES)})"
                )
            special = len(self._special.findall(end, len(head)))
            if special == 0:
                raise ValueError(
                    "the tokenizer's chat template ends an answer without a special token, so"
                    " stopping could not be learnt: name a built-in template instead"
                    f" ({', '.join(TEMPLATES)})"
                )
            answers.append((len(head), special))
        return _Rendered(text, answers)

    def _skeleton(self, messages: Sequence[Message]) -> list[int]:
        """The special ids that the template writes for these roles, whatever the contents."""
        roles = tuple(message.role for message in messages)
        if roles not in self._skeletons:
            (text,) = self._render([[Message(m.role, "a") for m in messages]], prompt=False)
            ids = self._tokenise([text], as_text=False)[text]
            self._skeletons[roles] = self._only_special(ids)
        return self._skeletons[roles]

    def _only_special(self, ids: list[int]) -> list[int]:
        return [i for i in ids if i in self._special_ids]

    def _mark(
        self, plan: _Rendered, ids_of: dict[str, list[int]], skeleton: list[int]
    ) -> Encoded | ValueError:
        ids = ids_of[plan.text]
        prompts = [ids_of[plan.text[:start]] for start, _ in plan.answers]
        starts = [len(prompt) for prompt in prompts]
        if any(ids[: len(prompt)] != prompt for prompt in prompts):
            # An answer's first characters merged with the text before it (a newline after a
            # newline). In use that text is the end of the prompt, so the answer is encoded alone.
            cuts = [0, *(start for start, _ in plan.answers), len(plan.text)]
            parts = [plan.text[begin:end] for begin, end in pairwise(cuts)]
            encoded = self._tokenise(dict.fromkeys(parts), as_text=False)
            lengths = [len(encoded[part]) for part in parts]
            starts = list(accumulate(lengths))[:-1]
            ids = [i for part in parts for i in encoded[part]]
        if self._only_special(ids) != skeleton:
            return ValueError("the row's text changes the special tokens of the chat template")
        special_at = [index for index, i in enumerate(ids) if i in self._special_ids]
        mask = [False] * len(ids)
        for start, (_, special) in zip(starts, plan.answers, strict=True):
            stop = [index for index in special_at if index >= start][special - 1]
            mask[start : stop + 1] = [True] * (stop + 1 - start)
        return Encoded(ids, mask)


def _check_prompt(messages: Sequence[Message]) -> None:
    if not messages or messages[-1].role == "assistant":
        raise ValueError("a prompt must end with a message to answer, not with an answer")


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {**added, **dict(named)}


def _describe(tokenizer: "PreTrainedTokenizerBase") -> str:
    """All of a tokenizer that decides ids, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # What the last caller asked of it, not what it is.
        del state["truncation"], state["padding"]
    else:
        state = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    special = sorted(_special_tokens(tokenizer).items())
    return json.dumps([state, special, tokenizer.special_tokens_map], sort_keys=True)


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
    family = recognise_glm(_special_tokens(tokenizer))
    if family is not None and "<think>" not in tokenizer.get_added_vocab():
        return _BuiltInTemplate(family, tokenizer)
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer has no chat template of its own: name a built-in one ({built_in})"
        )
    return _OwnTemplate(tokenizer)
