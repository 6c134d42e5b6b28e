"""The tokenizer's own chat template: rendered once a row, its answers found by the row's shape."""

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from slap_ds.data.chat_layout import Layout, find_texts, lay_out, shape_of
from slap_ds.data.encoding import Encoded, Template, Written, check_prompt
from slap_ds.data.formats import Message
from slap_ds.data.message_fields import ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
_CALLING = (
    Message("user", "a"),
    Message("assistant", "", calls=(ToolCall("f", '{"x": "b"}', "call00001"),)),
    Message("tool", "c", name="f", call_id="call00001"),
    Message("assistant", "d"),
)
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SHAPES = 4096  # layouts that are remembered

Shape = tuple[Any, ...]


class OwnTemplate(Template):
    """The template "auto" where the tokenizer has a chat template.

    Raises ValueError: the answers of a plain conversation cannot be found in it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        source = tokenizer.get_chat_template()
        super().__init__("auto", source, tokenizer)
        self._source = _FIXED_DATE + source if "strftime_now" in source else source
        self._layouts: dict[Shape, tuple[Layout, bool] | ValueError] = {}
        self._in_parts = False
        self._splits_thoughts = False
        self.encode(self._settle())
        self._splits_thoughts = self._knows_thoughts()
        stops, layout = set(self._layout(_PROBE, "")[0].stops), self._layout(_PROBE[:2], "")[0]
        with contextlib.suppress(ValueError):  # not every template has calls
            stops |= self._layout(_CALLING, "")[0].stops
        self.stop_ids = tuple(sorted(self._special_id[stop] for stop in stops))
        if layout.opened:
            self.notes = (
                f"the generation prompt of the tokenizer's chat template ends in {layout.opened!r},"
                " which it does not write before an answer without reasoning: such answers are"
                " trained, and evaluated, without it",
            )

    def encode_batch(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[str] = ()
    ) -> list[Encoded | ValueError]:
        found: list[Written | ValueError] = []
        offered = tools or [""] * len(conversations)
        for messages, offer in zip(conversations, offered, strict=True):
            try:
                found.append(self._written(messages, offer))
            except ValueError as error:
                found.append(error)
        marked = iter(self._marked([row for row in found if isinstance(row, Written)]))
        return [row if isinstance(row, ValueError) else next(marked) for row in found]

    def encode_prompt(
        self, messages: Sequence[Message], tools: str = "", answer: Message | None = None
    ) -> list[int]:
        check_prompt(messages)
        answered = (*messages, replace(answer or Message("assistant", "a"), trained=True))
        text, layout, move = self._find(answered, tools)
        prompt = text[: move(layout.prompt_end)]
        earlier = [(move(a), move(b)) for a, b in filter(None, layout.spans[:-1])]
        (encoded,) = self._marked([Written(prompt, tuple(earlier))])
        if isinstance(encoded, ValueError):
            raise encoded
        return encoded.ids

    def _settle(self) -> tuple[Message, ...]:
        """The probe; on the way, whether the template takes contents as text or as lists."""
        try:
            self._layout(_PROBE, "")
        except ValueError as error:
            self._layouts.clear()
            self._in_parts = True
            try:
                self._layout(_PROBE, "")
            except ValueError:
                raise error from None
        return _PROBE

    def _knows_thoughts(self) -> bool:
        """Whether reasoning in the text, between <think> and </think>, is written like reasoning
        beside it."""
        apart = (_PROBE[0], Message("assistant", "b", reasoning="r"))
        within = (_PROBE[0], Message("assistant", "<think>\nr\n</think>\n\nb"))
        try:
            written = self._render(apart, "")
            return "r" in written.replace(self._render(_PROBE[:2], ""), "") and (
                written == self._render(within, "")
            )
        except ValueError:
            return False

    def _written(self, messages: Sequence[Message], tools: str) -> Written:
        text, layout, move = self._find(messages, tools)
        answers = [message for message in messages if message.role == "assistant"]
        wanted = [s for s, m in zip(layout.spans, answers, strict=True) if m.trained]
        spans = [span for span in wanted if span is not None]
        if wanted and not spans:
            raise ValueError(
                "the tokenizer's chat template writes the answers to be trained otherwise once the"
                " conversation goes on, so none can be trained"
            )
        moved = tuple((move(begin), move(stop)) for begin, stop in spans)
        return Written(text + layout.appended, moved, len(wanted) - len(spans))

    def _find(
        self, messages: Sequence[Message], tools: str
    ) -> tuple[str, Layout, Callable[[int], int]]:
        """The conversation as the template writes it, and its layout with where its places lie."""
        messages = [self._apart(message) for message in messages]
        self._refuse_special(messages, tools)
        layout, as_text = self._layout(messages, tools)
        text = self._render(messages, tools, arguments_as_text=as_text)
        return text, layout, find_texts(layout, text, messages)

    def _apart(self, message: Message) -> Message:
        if not self._splits_thoughts or message.role != "assistant" or message.reasoning:
            return message
        found = _THOUGHT.fullmatch(message.content)
        if found is None or not found[1].strip():
            return message
        return replace(message, reasoning=found[1].strip("\n"), content=found[2].lstrip("\n"))

    def _refuse_special(self, messages: Sequence[Message], tools: str) -> None:
        from slap_ds.data.templates import TEMPLATES

        for number, message in enumerate(messages, 1):
            calls = [part for call in message.calls for part in (call.name, call.arguments)]
            for text in (message.content, message.reasoning, *calls, tools):
                if found := self._any_special.search(text):
                    raise ValueError(
                        f"message {number} holds {found[0]!r}, which the tokenizer's own chat"
                        " template would turn into a control token; a built-in template"
                        f" ({', '.join(TEMPLATES)}) can keep it as text"
                    )

    def _layout(self, messages: Sequence[Message], tools: str) -> tuple[Layout, bool]:
        """The layout of the messages' shape, and whether arguments of calls are given as text."""
        key: Shape = (
            tools,
            *(
                (m.role, bool(m.content), bool(m.reasoning), m.calls, m.name, m.call_id)
                for m in messages
            ),
        )
        if key not in self._layouts:
            if len(self._layouts) == _SHAPES:
                self._layouts.clear()
            try:
                self._layouts[key] = self._laid_out(shape_of(messages), tools)
            except ValueError as error:
                self._layouts[key] = error
        found = self._layouts[key]
        if isinstance(found, ValueError):
            raise found
        return found

    def _laid_out(self, shape: Sequence[Message], tools: str) -> tuple[Layout, bool]:
        # transformers' documentation gives arguments as an object; some templates expect text.
        forms = (False, True) if any(message.calls for message in shape) else (False,)
        for as_text in forms:

            def write(
                messages: Sequence[Message],
                prompt: bool,
                settings: Mapping[str, Any],
                as_text: bool = as_text,
            ) -> str:
                return self._render(messages, tools, prompt, as_text, settings)

            try:
                marked = self._marks(shape, tools, as_text)
                layout = lay_out(shape, write, self._special, marked)
            except ValueError:
                if as_text is forms[-1]:
                    raise
                continue
            if tools and not all(
                tool["function"]["name"] in layout.text for tool in json.loads(tools)
            ):
                raise ValueError("the tokenizer's chat template leaves out the row's tools")
            return layout, as_text
        raise AssertionError

    def _marks(
        self, shape: Sequence[Message], tools: str, as_text: bool
    ) -> list[tuple[int, int]] | None:
        """What the template itself marks as the assistant's part, in characters."""
        if not _MARKS.search(self._source):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            _, found = render_jinja_template(
                conversations=[self._as_dicts(shape, as_text)],
                tools=json.loads(tools) if tools else None,
                chat_template=self._source,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except _REFUSALS as error:
            raise ValueError(f"the tokenizer's chat template refuses this: {error}") from error
        return [(begin, end) for begin, end in found[0] if end > begin]

    def _render(
        self,
        messages: Sequence[Message],
        tools: str,
        prompt: bool = False,
        arguments_as_text: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                self._as_dicts(messages, arguments_as_text),
                tools=json.loads(tools) if tools else None,
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=prompt,
                **(settings or {}),
            )
        except _REFUSALS as error:
            raise ValueError(f"the tokenizer's chat template refuses this: {error}") from error
        return text

    def _as_dicts(self, messages: Sequence[Message], as_text: bool) -> list[dict[str, Any]]:
        return [as_dict(message, self._in_parts, as_text) for message in messages]


_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


def as_dict(
    message: Message, in_parts: bool = False, arguments_as_text: bool = False
) -> dict[str, Any]:
    """A message in the form that chat templates read."""
    content: Any = message.content
    found: dict[str, Any] = {"role": message.role}
    found["content"] = [{"type": "text", "text": content}] if in_parts else content
    if message.reasoning:
        found["reasoning_content"] = found["thinking"] = message.reasoning
    if message.calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": call.arguments
                    if arguments_as_text
                    else json.loads(call.arguments),
                },
            }
            for call in message.calls
        ]
    if message.name:
        found["name"] = message.name
    if message.call_id:
        found["tool_call_id"] = message.call_id
    return found
