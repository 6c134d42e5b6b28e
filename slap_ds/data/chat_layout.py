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

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from slap_ds.data.formats import Message
from slap_ds.data.slots import CONTENT, LOST, SLOT, name_of, slot, slots_of, words_of

# A longer conversation is checked in windows: an answer as the last of about so many messages.
_WINDOW = 16
# How templates are told whether the answer begins with reasoning.
_PROMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"enable_thinking": False},
    {"enable_thinking": True},
    {"thinking": False},
    {"thinking": True},
)

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
    of_marks = _marked_spans(text, shape, turns, marked or (), special)
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
        if lost := [slot for slot in slots_of(shape[index]) if slot not in turn.text]:
            raise ValueError(LOST.format(name_of(lost[0])))
        stops.add(special.findall((turn.text + turn.opener)[: turn.stop])[-1])
        opened = opened or turn.opened
        if index == len(shape) - 1 and of_marks is None:
            appended = turn.opener
        span = _in_whole(text + appended, index, turn)
        prompt_end = turn.begin if span is None else span[0]
        if of_marks is not None and all(slot in text for slot in slots_of(shape[index])):
            span = of_marks[number]
        spans.append(span)
    _check_texts(text, shape)
    return Layout(text, tuple(spans), prompt_end, appended, opened, frozenset(stops))


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


def _as_last(shape: Sequence[Message], index: int, write: Write, special: re.Pattern[str]) -> _Turn:
    before, answer = _before(shape, index), shape[index]
    text = write([*before, answer], False, {})
    begin, opened = _begin(text, before, answer, index, write, special)
    own = _end_of(text, answer, begin)
    after = _followed(shape, index, before, write)
    stops = [m.end() for m in special.finditer(text, own)]
    shared = _shared(text, after, special)
    whole = len(before) == index
    if both := [stop for stop in stops if stop <= shared]:
        return _Turn(text, whole, begin, both[-1], opened=opened)
    if stops:
        return _Turn(text, whole, begin, stops[-1], opened=opened)
    # What comes before may be written otherwise in it; a last answer is known by its slot.
    slots = slots_of(answer)
    end = after.rfind(slots[-1]) + len(slots[-1]) if slots else own
    opener = None
    if after.startswith(text[own:], end):
        opener = special.match(after, end + len(text) - own)
    if opener is None:
        raise ValueError(_NO_STOP)
    return _Turn(text, whole, begin, len(text) + len(opener[0]), opener[0], opened)


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
    own = [text.find(slot) for slot in slots_of(answer) if slot in text]
    first = min(own, default=len(text))
    fitting = next((prompt for prompt in prompts if text.startswith(prompt)), None)
    if fitting is not None:
        begin, opened = len(fitting), ""
        # A header in front of the words that the prompt does not have, though it was asked for.
        header = own and text[begin:first].strip() and before[-1].role == "user"
        if header and fitting == write(before, False, {}):
            raise ValueError(_IGNORED)
    else:
        shared = _shared(text, prompts[0], special)
        begin = max((m.end() for m in special.finditer(text, 0, shared)), default=0)
        if begin < shared:  # a header in words, which ends with its line
            begin = text.rfind("\n", begin, shared) + 1
        opened = prompts[0][begin:]
    if begin <= _last_slot(text[:first]) or begin > first:
        raise ValueError(_APART)
    return begin, opened


def _last_slot(text: str) -> int:
    return max((m.end() for m in SLOT.finditer(text)), default=-1) - 1


def _end_of(text: str, answer: Message, begin: int) -> int:
    """Where the answer's own words end."""
    words = [*slots_of(answer)]
    for call in answer.calls:
        words += words_of(call.arguments, call.name)
    found = [(text.rfind(word, begin), word) for word in words]
    return max((at + len(word) for at, word in found if at >= 0), default=begin)


def _followed(shape: Sequence[Message], index: int, before: Sequence[Message], write: Write) -> str:
    """The answer and one message more: the row's own, else such a one as could follow."""
    answer, mark = shape[index], slot(index + 1, CONTENT)
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
    before = slot(index - 1, CONTENT)
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
    shape: Sequence[Message],
    turns: Sequence[int],
    marked: Sequence[tuple[int, int]],
    special: re.Pattern[str],
) -> list[tuple[int, int]] | None:
    """The template's own marks, each with its stop token; None where they do not tell the turns."""
    spans = []
    for index, after in zip(turns, [*turns[1:], None], strict=True):
        first = max(text.rfind(slot(index - 1, CONTENT)), 0)
        last = text.rfind(slot(after - 1, CONTENT)) if after is not None else len(text)
        here = [(begin, end) for begin, end in marked if first <= begin < last]
        if not here or any(a[1] != b[0] for a, b in pairwise(here)):
            return None
        begin, end = here[0][0], here[-1][1]
        if not all(slot in text[begin:end] for slot in slots_of(shape[index]) if slot in text):
            return None
        inside = [m.end() for m in special.finditer(text, begin, end)]
        stopped = bool(inside) and not text[max(inside[-1], _last_slot(text[:end])) : end].strip()
        following = special.match(text, end)
        if not stopped and following is None:
            return None
        spans.append((begin, end if stopped or following is None else following.end()))
    return spans


def _check_texts(text: str, shape: Sequence[Message]) -> None:
    """Raises ValueError where the template leaves out a text or a call."""
    for index, message in enumerate(shape):
        words = [slot for slot in slots_of(message) if slot[8] == CONTENT]
        if lost := [slot for slot in words if slot not in text]:
            raise ValueError(LOST.format(f"{name_of(lost[0])} ('{message.role}')"))
        begin = max(text.rfind(slot(index - 1, CONTENT)), 0)
        end = text.find(slot(index + 1, CONTENT))
        part = text[begin : end if end >= 0 else len(text)]
        for call in message.calls:
            if not all(word in part for word in words_of(call.arguments, call.name)):
                raise ValueError(LOST.format(f"a call of message {index + 1}"))
