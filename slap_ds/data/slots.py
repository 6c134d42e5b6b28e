"""Conversations with slots in place of their texts, and the texts found again in what was written.

messages -> shape (a slot for every text) -> written by a template -> literals and slots
the same messages written -> the literals, with the texts between them, or what was lost
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from slap_ds.data.formats import Message

# Letters and digits alone, which no filter of a template changes.
SLOT = re.compile(r"Qz\d{6}[CRT]zQ")
# An answer's content, its reasoning beside it, and its reasoning in the content.
CONTENT, _REASONING, _THOUGHT = "CRT"
_THINKS = re.compile(r"(\s*<think>)(.*?)(</think>)(.*)", re.DOTALL)
LOST = (
    "the tokenizer's chat template leaves out or changes {} of this row, so something else than"
    " the row would be trained"
)


def shape_of(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with a slot in place of every text; `<think>` and `</think>` in them stay."""
    return tuple(_shape_of(index, message) for index, message in enumerate(messages))


def _shape_of(index: int, message: Message) -> Message:
    content = slot(index, CONTENT) if message.content else ""
    if thought := _thought(message):
        rest = slot(index, CONTENT) if thought[4].strip() else thought[4]
        content = thought[1] + slot(index, _THOUGHT) + thought[3] + rest
    reasoning = slot(index, _REASONING) if message.reasoning else ""
    return replace(message, content=content, reasoning=reasoning, trained=True)


def _thought(message: Message) -> re.Match[str] | None:
    """An answer that begins with its reasoning: <think>, the reasoning, </think>, the rest."""
    found = _THINKS.fullmatch(message.content) if message.role == "assistant" else None
    return found if found and found[2].strip() else None


def _text(message: Message, kind: str) -> str:
    """What stands in a slot."""
    if kind == _REASONING:
        return message.reasoning
    thought = _thought(message)
    if thought is None:
        return message.content
    return thought[2] if kind == _THOUGHT else thought[4]


def find_texts(layout: str, written: str, messages: Sequence[Message]) -> Callable[[int], int]:
    """Check that `written` is `layout`, the writing of the shape, with the messages' texts in it.

    Returns: from places in the layout to places in `written`.

    Raises:
        ValueError: a text is not where the layout has it, as it is (white space at its ends may go,
            and it may stand as in a JSON string).
    """
    literals = SLOT.split(layout)
    slots = SLOT.findall(layout)
    ours, theirs = [0], [0]  # where each literal begins, in the layout and in `written`
    place = 0
    for number, literal in enumerate(literals):
        if not written.startswith(literal, place):
            raise ValueError(LOST.format("the text around its messages"))
        place += len(literal)
        if number == len(slots):
            break
        index, kind = int(slots[number][2:8]), slots[number][8]
        after, last = literals[number + 1], number == len(slots) - 1
        for form in _forms(_text(messages[index], kind)):
            end = place + len(form)
            whole = not last or end + len(after) == len(written)
            if whole and written.startswith(form, place) and written.startswith(after, end):
                break
        else:
            raise ValueError(LOST.format(name_of(slots[number])))
        ours.append(ours[-1] + len(literal) + len(slots[number]))
        place = end
        theirs.append(place)
    if place != len(written):
        raise ValueError(LOST.format("the end of the conversation"))

    def move(at: int) -> int:
        number = max(i for i, begin in enumerate(ours) if begin <= at)
        return theirs[number] + at - ours[number]

    return move


def slot(index: int, kind: str) -> str:
    return f"Qz{index:06d}{kind}zQ"


def slots_of(shape: Message) -> list[str]:
    """The slots in a message of a shape."""
    return SLOT.findall(shape.reasoning) + SLOT.findall(shape.content)


def name_of(slot: str) -> str:
    what = "text" if slot[8] == CONTENT else "reasoning"
    return f"the {what} of message {int(slot[2:8]) + 1}"


def words_of(arguments: str, *names: str) -> list[str]:
    """Names, and the keys and values of arguments, as a template can write them."""

    def leaves(value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield key
                yield from leaves(item)
        elif isinstance(value, list):
            for item in value:
                yield from leaves(item)
        elif isinstance(value, str):
            # As it is or as in JSON: the longest run of characters that is the same in both.
            yield max(re.split(r"[^ !#-\[\]-~]", value), key=len)
        elif not isinstance(value, (bool, type(None))):
            yield str(value)

    return [*names, *leaves(json.loads(arguments))]


def _forms(value: str) -> Iterator[str]:
    """The ways in which templates write a text without changing it."""
    for plain in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
        yield plain
        for ends in (None, "\n"):
            yield from (plain.rstrip(ends), plain.lstrip(ends), plain.strip(ends))
