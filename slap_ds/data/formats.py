"""From rows to conversations.

    paths -> sources -> rows -> FORMATS[recognise(row)] -> Conversation | Reject

A row that cannot be used is never lost and never stops the reading: it comes out as a `Reject`
with its file, its row number and a reason.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from slap_ds.data.message_fields import (
    ToolCall,
    call_of,
    calls_of,
    check_row,
    has_media,
    is_trained,
    reasoning_of,
    refuse_other_kinds,
    tools_of,
)
from slap_ds.data.rows import read_rows
from slap_ds.data.sources import Limits, Source, find_sources, kind_of, size_of

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Of an assistant's turn, `reasoning` is what it thinks before it answers and `calls` are the
    tools that it calls; with `trained` False the turn is read, not trained. Of a tool's turn,
    `name` is the tool's and `call_id` the id of the call it answers, where the row says so.
    """

    role: Role
    content: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    trained: bool = True
    name: str = ""
    call_id: str = ""

    @property
    def size(self) -> int:
        """Characters in it."""
        called = sum(len(call.name) + len(call.arguments) for call in self.calls)
        return len(self.content) + len(self.reasoning) + called


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in an order that nearly every template can write (see _MAY_FOLLOW).

    `tools` are those offered to the assistant: a JSON list as text, "" for none. `media` is True
    where the row has images or the like beside its texts.
    """

    messages: tuple[Message, ...]
    task: str = ""
    source: str = ""
    lang: str = ""
    tools: str = ""
    media: bool = False

    @property
    def size(self) -> int:
        """Characters in it."""
        return sum(message.size for message in self.messages) + len(self.tools)


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that was not used. `line` is its number in the file, from 1 (in `.jsonl`, the line)."""

    file: str
    line: int
    reason: str


_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# Some templates could write more (a greeting by the assistant, two users in a row); this is what
# nearly all can, so that a row good for one model is good for the next.
_MAY_FOLLOW: dict[str, tuple[Role, ...]] = {
    "the start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {kind_of(value)}, expected text")
    if not value.strip():
        raise ValueError(f"{where} is empty")
    return value


def _optional(row: Mapping[str, Any], field: str) -> str:
    """The text of a field that may be missing or empty."""
    value = row.get(field)
    return "" if value is None or value == "" else _text(value, f"'{field}'")


def _message(value: object, number: int) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"message {number} is {kind_of(value)}, expected an object")
    # Tables fill up with nulls where rows of both kinds stand in one.
    from_value = value.get("from") is not None
    role_key, text_key = ("from", "value") if from_value else ("role", "content")
    role = value.get(role_key)
    if not isinstance(role, str):
        raise ValueError(f"message {number}: '{role_key}' is {kind_of(role)}, expected text")
    if role not in _ROLES:
        raise ValueError(
            f"message {number}: unknown role {role[:40]!r}, expected one of {', '.join(_ROLES)}"
        )
    where, known = f"message {number}: '{text_key}'", _ROLES[role]
    trained, reasoning = is_trained(value, number, known), reasoning_of(value, number, known)
    calls = calls_of(value, number, known)
    text = value.get(text_key)
    if role == "function_call" and not calls:
        # The text is a call, not words.
        calls, text = (call_of(_text(text, where), where),), ""
    content = "" if calls and text in (None, "") else _text(text, where)
    name, call_id = (
        found if known == "tool" and isinstance(found := value.get(field), str) else ""
        for field in ("name", "tool_call_id")
    )
    return Message(known, content, reasoning, calls, trained, name, call_id)


def _messages(row: Mapping[str, Any], field: str) -> list[Message]:
    values = row.get(field)
    if not isinstance(values, list):
        raise ValueError(f"'{field}' is {kind_of(values)}, expected a list of messages")
    return [_message(value, number) for number, value in enumerate(values, 1)]


def _conversation(row: Mapping[str, Any], messages: Sequence[Message]) -> Conversation:
    if all(message.role != "assistant" for message in messages):
        raise ValueError("no assistant turn, so nothing to train on")
    if not any(message.role == "assistant" and message.trained for message in messages):
        raise ValueError("every assistant turn is marked as not to be trained")
    check_row(row)
    previous = "the start"
    for number, message in enumerate(messages, 1):
        if message.role not in _MAY_FOLLOW[previous]:
            expected = " or ".join(_MAY_FOLLOW[previous])
            raise ValueError(
                f"message {number} is '{message.role}' after {previous}, expected {expected}"
            )
        previous = message.role
    task, source, lang = (
        value if isinstance(value := row.get(field), str) else ""
        for field in ("task", "source", "lang")
    )
    return Conversation(tuple(messages), task, source, lang, tools_of(row), has_media(row))


def _from_messages(row: Mapping[str, Any]) -> Conversation:
    return _conversation(row, _messages(row, "messages"))


def _from_sharegpt(row: Mapping[str, Any]) -> Conversation:
    system = _optional(row, "system")
    messages = _messages(row, "conversations")
    return _conversation(row, [Message("system", system), *messages] if system else messages)


def _from_alpaca(row: Mapping[str, Any]) -> Conversation:
    messages: list[Message] = []
    if system := _optional(row, "system"):
        messages.append(Message("system", system))
    history = row.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f"'history' is {kind_of(history)}, expected a list of [question, answer]")
    for number, turn in enumerate(history, 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"turn {number} of 'history' is not a [question, answer] pair")
        messages.append(
            Message("user", _text(turn[0], f"the question in turn {number} of 'history'"))
        )
        messages.append(
            Message("assistant", _text(turn[1], f"the answer in turn {number} of 'history'"))
        )
    question = _text(row.get("instruction"), "'instruction'")
    if extra := _optional(row, "input"):
        question = f"{question}\n{extra}"
    messages.append(Message("user", question))
    messages.append(Message("assistant", _text(row.get("output"), "'output'")))
    return _conversation(row, messages)


def _from_prompt_completion(row: Mapping[str, Any]) -> Conversation:
    messages = [Message("system", system)] if (system := _optional(row, "system")) else []
    messages.append(Message("user", _text(row.get("prompt"), "'prompt'")))
    messages.append(Message("assistant", _text(row.get("completion"), "'completion'")))
    return _conversation(row, messages)


FORMATS: dict[str, Callable[[Mapping[str, Any]], Conversation]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}
_FIELDS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}


def recognise(row: Mapping[str, Any]) -> str:
    """The name of the first format whose fields the row has.

    Null counts as absent, because tables fill up with nulls. Raises ValueError, naming the fields
    found and the known formats, where none fits.
    """
    refuse_other_kinds(row)
    for name, fields in _FIELDS.items():
        if all(row.get(field) is not None for field in fields):
            return name
    if "text" in row:
        raise ValueError(
            "a row of plain text (text), which has no answer to train: use a tool for continued"
            " pre-training, such as TRL's SFTTrainer, or write prompt and completion"
        )
    fields_found = sorted(str(key)[:40] for key, value in row.items() if value is not None)
    found = ", ".join(key if key.isprintable() else ascii(key) for key in fields_found[:20])
    known = "; ".join(f"{name} ({', '.join(fields)})" for name, fields in _FIELDS.items())
    raise ValueError(
        f"unknown format: found the fields {found or '(none)'}; known formats: {known}"
    )


def conversation_of(row: Mapping[str, Any], format: str, limits: Limits) -> Conversation:
    """The conversation of a row of this format, or of the one that `auto` recognises.

    Raises ValueError, saying what is wrong with the row.
    """
    found = FORMATS[recognise(row) if format == "auto" else format](row)
    # Tables have no lines that could have been measured.
    if found.size > limits.row_bytes:
        raise ValueError(f"longer than {size_of(limits.row_bytes)}")
    return found


def check_format(format: str) -> None:
    """Raises ValueError: there is no such format."""
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"unknown data format {format!r}: expected auto, {', '.join(FORMATS)}")


def used(
    source: Source,
    number: int,
    row: Mapping[str, Any] | ValueError,
    format: str,
    limits: Limits,
) -> Conversation | Reject:
    """What becomes of a row as it was read; `source` is the file's label where it names none."""
    try:
        if isinstance(row, ValueError):
            raise row
        found = conversation_of(row, format, limits)
    except ValueError as error:
        return Reject(source.name, number, str(error))
    return found if found.source else replace(found, source=source.label)


def read_sources(
    sources: Sequence[Source], format: str = "auto", limits: Limits | None = None
) -> Iterator[Conversation | Reject]:
    """Every row of the sources, in order. Raises as `read_conversations`."""
    check_format(format)
    limits = limits or Limits()
    for source in sources:
        for number, row in read_rows(source, limits):
            yield used(source, number, row, format, limits)


def read_conversations(
    paths: Sequence[str], format: str = "auto"
) -> Iterator[Conversation | Reject]:
    """Every row behind the paths, in order, as a conversation or a reject.

    `find_sources` says what a path may be. `format` is a key of FORMATS, or "auto": each row is
    recognised by its fields. Rows without a `source` get the file's name without its suffix.

    Raises FileNotFoundError (nothing at a path) and ValueError (unknown format, unreadable file,
    hub error).
    """
    yield from read_sources(find_sources(paths), format)
