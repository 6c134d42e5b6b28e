"""The tokenizer's own chat template: rendered once a row, its answers found by the row's shape."""

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from slap_ds.data.chat_layout import Layout, lay_out
from slap_ds.data.encoding import Encoded, Template, Written, check_prompt
from slap_ds.data.formats import Message
from slap_ds.data.message_fields import ToolCall
from slap_ds.data.slots import find_texts, shape_of

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
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# GLM-4.5's control token for users, which its own template writes at the end of a question.
_NO_THOUGHT = "/nothink"
_SHAPES = 4096  # layouts that are remembered

Shape = tuple[str, tuple[Message, ...]]  # tools, and messages with slots


class OwnTemplate(Template):
    """The template "auto" where the tokenizer has a chat template.

    Raises ValueError: the answers of a plain conversation cannot be found in it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        source = tokenizer.get_chat_template()
        super().__init__("auto", source, tokenizer)
        self.jinja = _FIXED_DATE + source if "strftime_now" in source else source
        self._layouts: dict[Shape, tuple[Layout, bool] | ValueError] = {}
        self.in_parts = False
        self.encode(self._settle())
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
            self.in_parts = True
            try:
                written = self._layout(_PROBE, "")[0].text
            except ValueError:
                raise error from None
            if str({"type": "text"})[:-1] in written:  # the list itself, as Python shows it
                raise error from None
        return _PROBE

    def _written(self, messages: Sequence[Message], tools: str) -> Written:
        text, layout, move = self._find(messages, tools)
        answers = [message for message in messages if message.role == "assistant"]
        wanted = [s for s, m in zip(layout.spans, answers, strict=True) if m.trained]
        spans = [span for span in wanted if span is not None]
        if wanted and not spans:
            raise ValueError(
                "the tokenizer's chat template writes the answers to be trained differently once"
                " the conversation continues, so none can be trained"
            )
        moved = tuple((move(begin), move(stop)) for begin, stop in spans)
        return Written(text + layout.appended, moved, len(wanted) - len(spans))

    def _find(
        self, messages: Sequence[Message], tools: str
    ) -> tuple[str, Layout, Callable[[int], int]]:
        """The conversation as the template writes it, and its layout with where its places lie."""
        self._refuse_special(messages, tools)
        layout, as_text = self._layout(messages, tools)
        text = self._render(messages, tools, arguments_as_text=as_text)
        return text, layout, find_texts(layout.text, text, messages)

    def _refuse_special(self, messages: Sequence[Message], tools: str) -> None:
        from slap_ds.data.templates import TEMPLATES

        for number, message in enumerate(messages, 1):
            calls = [part for call in message.calls for part in (call.name, call.arguments)]
            content = message.content
            if message.role == "user" and _NO_THOUGHT in self.chat_template:
                content = content.removesuffix(_NO_THOUGHT)
            for text in (content, message.reasoning, *calls, tools):
                if found := self._any_special.search(text):
                    raise ValueError(
                        f"message {number} holds {found[0]!r}, which the tokenizer's own chat"
                        " template would turn into a control token; a built-in template"
                        f" ({', '.join(TEMPLATES)}) can keep it as text"
                    )

    def _layout(self, messages: Sequence[Message], tools: str) -> tuple[Layout, bool]:
        """The layout of the messages' shape, and whether arguments of calls are given as text."""
        shape = shape_of(messages)
        key = (tools, shape)
        if key not in self._layouts:
            if len(self._layouts) == _SHAPES:
                self._layouts.clear()
            try:
                self._layouts[key] = self._laid_out(shape, tools)
            except ValueError as error:
                self._layouts[key] = error
        found = self._layouts[key]
        if isinstance(found, ValueError):
            raise found
        return found

    def _laid_out(self, shape: Sequence[Message], tools: str) -> tuple[Layout, bool]:
        # transformers' documentation gives arguments as an object; some templates expect text.
        problem: ValueError | None = None
        for as_text in (False, True):

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
            except ValueError as error:
                problem = problem or error
                if not any(message.calls for message in shape):
                    break
            else:
                _check_tools(layout, tools)
                return layout, as_text
        assert problem is not None
        raise problem

    def _marks(
        self, shape: Sequence[Message], tools: str, as_text: bool
    ) -> list[tuple[int, int]] | None:
        """What the template itself marks as the assistant's part, in characters."""
        if not _MARKS.search(self.jinja):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            _, found = render_jinja_template(
                conversations=[self._as_dicts(shape, as_text)],
                tools=json.loads(tools) if tools else None,
                chat_template=self.jinja,
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
                chat_template=self.jinja,
                tokenize=False,
                add_generation_prompt=prompt,
                **(settings or {}),
            )
        except _REFUSALS as error:
            raise ValueError(f"the tokenizer's chat template refuses this: {error}") from error
        return text

    def _as_dicts(self, messages: Sequence[Message], as_text: bool) -> list[dict[str, Any]]:
        return [as_dict(message, self.in_parts, as_text) for message in messages]


def _check_tools(layout: Layout, tools: str) -> None:
    """Raises ValueError where the template does not write the row's tools."""
    for tool in json.loads(tools or "[]"):
        if tool["function"]["name"] not in layout.text:
            raise ValueError("the tokenizer's chat template leaves out the row's tools")


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
