"""Where a chat template puts what: its writing of a conversation's shape, with slots for the texts.

    shape (roles, which texts there are) -> writings with a mark in place of every text
        the whole conversation           -> literals and slots
        each answer as the last message  -> where it begins (the prompt ends there) and stops
    row's own writing against literals and slots -> every text in its place, or a reason

So a template is asked once for a shape, not for every row, and a text that it drops, moves or
changes is seen. An answer is trained where the whole conversation writes it as it was written when
it was the last message: only then has the model before it what it has in use. Templates that drop
the reasoning of earlier answers, or close the last one in another way, leave the earlier answers
as context.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from slap_ds.data.formats import Message

# Letters and digits alone, which no filter of a template changes.
_SLOT = re.compile(r"Qz\d{6}[CR]zQ")
# A longer conversation is checked in windows: an answer as the last of about so many messages.
_WINDOW = 16
# How templates are told that the answer does not begin with reasoning.
_PROMPTS: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"thinking": False})

Write = Callable[[Sequence[Message], bool, Mapping[str, Any]], str]


@dataclass(frozen=True, slots=True)
class Layout:
    """A shape as the template writes it.

    text: with slots in place of the texts. spans: of every assistant turn where its trained part
    begins and ends in `text`, or None where it is written otherwise than when it is generated.
    prompt_end: where the prompt of the last turn ends, if that is an answer.
    appended: a stop token after the end of the text, which the template leaves to the next turn.
    opened: what the template's own prompt has more than the text before an answer.
    stops: the special tokens at which generation of an answer ends.
    """

    text: str
    spans: tuple[tuple[int, int] | None, ...]
    prompt_end: int
    appended: str = ""
    opened: str = ""
    stops: frozenset[str] = frozenset()


def shape_of(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with a slot in place of every text."""
    return tuple(
        replace(
            message,
            content=_slot(i, "C") if message.content else "",
            reasoning=_slot(i, "R") if message.reasoning else "",
            trained=True,
        )
        for i, message in enumerate(messages)
    )


def lay_out(
    shape: Sequence[Message],
    write: Write,
    special: re.Pattern[str],
    marked: Sequence[tuple[int, int]] | None = None,
) -> Layout:
    """The layout of a shape.

    Args:
        write: the template: (messages, whether the prompt for an answer follows, settings) -> text.
        special: matches the special tokens.
        marked: the parts of the shape's writing that the template itself marks as the assistant's.

    Raises:
        ValueError: the template drops a text, ignores that a prompt is asked for, ends answers
            without a special token, or refuses the shape.
    """
    text = write(shape, False, {})
    turns = [i for i, message in enumerate(shape) if message.role == "assistant"]
    of_marks = _marked_spans(text, turns, marked or (), special)
    spans: list[tuple[int, int] | None] = []
    appended = opened = ""
    prompt_end, stops = 0, set()
    for number, index in enumerate(turns):
        try:
            turn = _as_last(shape, index, write, special)
        except ValueError:
            if of_marks is None:
                raise
            spans.append(of_marks[number])
            prompt_end = of_marks[number][0]
            stops.add(special.findall(text[: of_marks[number][1]])[-1])
            continue
        stops.add(special.findall((turn.text + turn.opener)[: turn.stop])[-1])
        opened = opened or turn.opened
        if index == len(shape) - 1 and of_marks is None:
            appended = turn.opener
        span = _in_whole(text + appended, index, turn)
        prompt_end = turn.begin if span is None else span[0]
        spans.append(span if of_marks is None else of_marks[number])
    _check_texts(text, shape, turns, spans)
    return Layout(text, tuple(spans), prompt_end, appended, opened, frozenset(stops))


def find_texts(layout: Layout, written: str, messages: Sequence[Message]) -> Callable[[int], int]:
    """Check that `written`, by the template, is the layout with the messages' texts in its slots.

    Returns: from places in the layout's text to places in `written`.

    Raises:
        ValueError: a text is not where the layout has it, as it is (white space at its ends may go,
            and it may stand as in a JSON string).
    """
    literals = _SLOT.split(layout.text)
    slots = _SLOT.findall(layout.text)
    ours, theirs = [0], [0]  # where each literal begins, in the layout and in `written`
    place = 0
    for number, literal in enumerate(literals):
        if not written.startswith(literal, place):
            raise ValueError(_LOST.format("the text around its messages"))
        place += len(literal)
        if number == len(slots):
            break
        index, kind = int(slots[number][2:8]), slots[number][8]
        message = messages[index]
        value = message.content if kind == "C" else message.reasoning
        after, last = literals[number + 1], number == len(slots) - 1
        for form in _forms(value):
            end = place + len(form)
            whole = not last or end + len(after) == len(written)
            if whole and written.startswith(form, place) and written.startswith(after, end):
                break
        else:
            what = "text" if kind == "C" else "reasoning"
            raise ValueError(_LOST.format(f"the {what} of message {index + 1}"))
        ours.append(ours[-1] + len(literal) + len(slots[number]))
        place = end
        theirs.append(place)
    if place != len(written):
        raise ValueError(_LOST.format("the end of the conversation"))

    def move(at: int) -> int:
        number = max(i for i, begin in enumerate(ours) if begin <= at)
        return theirs[number] + at - ours[number]

    return move


_LOST = (
    "the tokenizer's chat template leaves out or changes {} of this row, so something else than"
    " the row would be trained"
)
_IGNORED = (
    "the tokenizer's chat template ignores add_generation_prompt, so the model would have to write"
    " the header of its own answer: add {% if add_generation_prompt %} with that header at its"
    " end, or name a built-in template"
)
_NO_STOP = (
    "the tokenizer's chat template ends an answer without a special token, so stopping could not"
    " be learnt: name a built-in template, or use the tokenizer that the template was made for"
)
_APART = (
    "the tokenizer's chat template writes a prompt that its own writing of the answer does not"
    " continue, so the answers cannot be told apart: name a built-in template"
)


@dataclass(frozen=True, slots=True)
class _Turn:
    """An answer written as the last message; places are characters of `text`."""

    text: str
    whole: bool  # whether all messages before it were written too
    begin: int
    stop: int  # beyond the end of the text where the next turn's `opener` is the stop
    opener: str = ""
    opened: str = ""


def _slot(index: int, kind: str) -> str:
    return f"Qz{index:06d}{kind}zQ"


def _as_last(shape: Sequence[Message], index: int, write: Write, special: re.Pattern[str]) -> _Turn:
    before, answer = _before(shape, index), shape[index]
    text = write([*before, answer], False, {})
    begin, opened = _begin(text, before, answer, index, write, special)
    own = _end_of(text, answer, index, begin)
    after = _followed(shape, index, before, write)
    stops = [m.end() for m in special.finditer(text, own)]
    shared = _shared(text, after, special)
    whole = len(before) == index
    if both := [stop for stop in stops if stop <= shared]:
        return _Turn(text, whole, begin, both[-1], opened=opened)
    if stops:
        return _Turn(text, whole, begin, stops[-1], opened=opened)
    opener = special.match(after, len(text)) if after.startswith(text) else None
    if opener is None:
        raise ValueError(_NO_STOP)
    return _Turn(text, whole, begin, opener.end(), opener[0], opened)


def _before(shape: Sequence[Message], index: int) -> list[Message]:
    """The messages before an answer: all, or a system message and a window from a user's on."""
    if index <= _WINDOW:
        return list(shape[:index])
    users = (i for i in range(index - _WINDOW, -1, -1) if shape[i].role == "user")
    start = next(users, 0)
    system = [shape[0]] if shape[0].role == "system" and start > 0 else []
    return [*system, *shape[start:index]]


def _begin(
    text: str,
    before: Sequence[Message],
    answer: Message,
    index: int,
    write: Write,
    special: re.Pattern[str],
) -> tuple[int, str]:
    """Where the prompt ends, and what the template's own prompt has beyond that."""
    prompts = [write(before, True, settings) for settings in _PROMPTS]
    own = [text.find(slot) for kind in "RC" if (slot := _slot(index, kind)) in text]
    first = min(own, default=len(text))
    fitting = next((prompt for prompt in prompts if text.startswith(prompt)), None)
    if fitting is not None:
        begin, opened = len(fitting), ""
        # A header in front of the words that the prompt does not have, though it was asked for.
        if own and fitting == write(before, False, {}) and text[begin:first].strip():
            raise ValueError(_IGNORED)
    else:
        shared = _shared(text, prompts[0], special)
        begin = max((m.end() for m in special.finditer(text, 0, shared)), default=0)
        opened = prompts[0][begin:]
    if begin <= _last_slot(text[:first]) or begin > first:
        raise ValueError(_APART)
    return begin, opened


def _last_slot(text: str) -> int:
    return max((m.end() for m in _SLOT.finditer(text)), default=-1) - 1


def _end_of(text: str, answer: Message, index: int, begin: int) -> int:
    """Where the answer's own words end."""
    ends = [m.end() for m in _SLOT.finditer(text, begin) if int(m[0][2:8]) == index]
    for call in answer.calls:
        ends += [at + len(word) for word in words_of(call.arguments, call.name)
                 if (at := text.rfind(word, begin)) >= 0]  # fmt: skip
    return max(ends, default=begin)


def _followed(shape: Sequence[Message], index: int, before: Sequence[Message], write: Write) -> str:
    """The answer and one message more: the row's own, else such a one as could follow."""
    answer, mark = shape[index], _slot(index + 1, "C")
    calls = answer.calls
    tool = Message("tool", mark, name=calls[0].name, call_id=calls[0].id) if calls else None
    follows = [m for m in (*shape[index + 1 : index + 2], tool, Message("user", mark)) if m]
    problem = ValueError(_NO_STOP)
    for message in follows:
        try:
            return write([*before, answer, message], False, {})
        except ValueError as error:
            problem = error
    raise problem


def _shared(one: str, other: str, special: re.Pattern[str]) -> int:
    """Characters that both begin with, without cutting a special token."""
    count = 0
    for a, b in zip(_atoms(one, special), _atoms(other, special), strict=False):
        if a != b:
            same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            of_text = not special.fullmatch(a) and not special.fullmatch(b)
            return count + ((min(len(a), len(b)) if same is None else same) if of_text else 0)
        count += len(a)
    return count


def _atoms(text: str, special: re.Pattern[str]) -> Iterator[str]:
    place = 0
    for mark in special.finditer(text):
        if mark.start() > place:
            yield text[place : mark.start()]
        yield mark[0]
        place = mark.end()
    if place < len(text):
        yield text[place:]


def _in_whole(text: str, index: int, turn: _Turn) -> tuple[int, int] | None:
    """The turn's span in the whole conversation, or None where it is written otherwise there."""
    before = _slot(index - 1, "C")
    here, there = text.rfind(before), turn.text.rfind(before)
    if min(here, there) < 0:
        # A call without words before it; or nothing, and `_check_texts` will say so.
        here = there = 0
        if not turn.whole:
            return None
    piece = (turn.text + turn.opener)[there : turn.stop]
    if not text.startswith(piece, here) or (turn.whole and text[:here] != turn.text[:there]):
        return None
    return here + turn.begin - there, here + turn.stop - there


def _marked_spans(
    text: str,
    turns: Sequence[int],
    marked: Sequence[tuple[int, int]],
    special: re.Pattern[str],
) -> list[tuple[int, int]] | None:
    """The template's own marks, each with its stop token; None where they do not tell the turns."""
    spans = []
    for index, after in zip(turns, [*turns[1:], None], strict=True):
        first = max(text.rfind(_slot(index - 1, "C")), 0)
        last = text.rfind(_slot(after - 1, "C")) if after is not None else len(text)
        here = [(begin, end) for begin, end in marked if first <= begin < last]
        if not here or any(a[1] != b[0] for a, b in pairwise(here)):
            return None
        begin, end = here[0][0], here[-1][1]
        words = [slot for kind in "RC" if (slot := _slot(index, kind)) in text]
        if not all(slot in text[begin:end] for slot in words):
            return None
        inside = [m.end() for m in special.finditer(text, begin, end)]
        stopped = bool(inside) and not text[max(inside[-1], _last_slot(text[:end])) : end].strip()
        following = special.match(text, end)
        if not stopped and following is None:
            return None
        spans.append((begin, end if stopped or following is None else following.end()))
    return spans


def _check_texts(
    text: str,
    shape: Sequence[Message],
    turns: Sequence[int],
    spans: Sequence[tuple[int, int] | None],
) -> None:
    """Raises ValueError where the template leaves out a text, or reasoning that is trained."""
    trained = {index for index, span in zip(turns, spans, strict=True) if span is not None}
    for index, message in enumerate(shape):
        where = f"of message {index + 1}"
        if message.content and message.content not in text:
            raise ValueError(_LOST.format(f"the text {where} ('{message.role}')"))
        if message.reasoning and index in trained and message.reasoning not in text:
            raise ValueError(_LOST.format(f"the reasoning {where}"))
        begin = max(text.rfind(_slot(index - 1, "C")), 0)
        end = text.find(_slot(index + 1, "C"))
        part = text[begin : end if end >= 0 else len(text)]
        for call in message.calls:
            if not all(word in part for word in words_of(call.arguments, call.name)):
                raise ValueError(_LOST.format(f"a call {where}"))


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
