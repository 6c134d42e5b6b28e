"""Chat templates in the layouts of many families: which characters are trained, by hand, and where
a template marks them itself, as transformers reads the marks."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from slap_ds.data.encoding import Encoded, Template
from slap_ds.data.formats import Message
from slap_ds.data.message_fields import ToolCall
from slap_ds.data.templates import make_template
from tests.small_tokenizers import byte_tokenizer

SPECIAL = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|channel|>",
    "<|eot|>",
)
TALK = (
    Message("user", "Q1"),
    Message("assistant", "A1"),
    Message("user", "Q2"),
    Message("assistant", "A2"),
)
# Roles between tokens, no more.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thinks before the last answer, and drops the thinking of those before.
THINKING = (
    "{% set last = namespace(i=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.i = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set c = m.content %}{% set r = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > last.i %}"
    "{{ '<think>\n' + r.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ c }}"
    "{% for t in m.tool_calls or [] %}\n<tool_call>{{ t.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The last answer ends in another token than those before.
RETURNING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>"
    "final{% endif %}<|im_end|>{{ m.content }}{{ '<|return|>' if loop.last and m.role =="
    " 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
# The whole conversation ends in a token of its own.
ENDING = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# An answer ends where the next role's token stands.
OPENING = (
    "<s>{% for m in messages %}"
    "{{ '<|observation|>' if m.role == 'tool' else '<|' + m.role + '|>' }}"
    "\n{{ m.content | trim }}{% for t in m.tool_calls or [] %}\n{{ t.function.name }}"
    "({% for k, v in t.function.arguments.items() %}{{ k }}={{ v }};{% endfor %})"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The prompt begins a thought that the template writes of no answer.
OPENED = (
    "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# No prompt, for the question's end is one; the system message joins the first question.
ROUNDS = (
    "{% for m in messages %}{% if m.role == 'system' %}{% set s = m.content %}"
    "{% elif m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
# Contents are lists, as with models that see.
PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content[0]['text'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_WITHOUT_STOP = MARKED.replace(
    "<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n"
)
FAMILIES: dict[str, tuple[str, list[str], set[str]]] = {
    "plain": (PLAIN, ["A1<|im_end|>", "A2<|im_end|>"], {"<|im_end|>"}),
    "thinking": (THINKING, ["<think>\n\n</think>\n\nA2<|im_end|>"], {"<|im_end|>"}),
    "returning": (RETURNING, ["<|channel|>final<|im_end|>A2<|return|>"], {"<|return|>"}),
    "ending": (ENDING, ["A1<|end|>", "A2<|end|>"], {"<|end|>"}),
    "opening": (
        OPENING,
        ["\nA1<|user|>", "\nA2<|user|>"],
        {"<|user|>", "<|observation|>"},
    ),
    "opened": (OPENED, ["A1</s>", "A2</s>"], {"</s>"}),
    "rounds": (ROUNDS, [" A1</s>", " A2</s>"], {"</s>"}),
    "parts": (PARTS, ["A1<|eot|>", "A2<|eot|>"], {"<|eot|>"}),
    "marked": (MARKED, ["A1<|im_end|>\n", "A2<|im_end|>\n"], {"<|im_end|>"}),
    "marked without stop": (
        MARKED_WITHOUT_STOP,
        ["A1<|im_end|>", "A2<|im_end|>"],
        {"<|im_end|>"},
    ),
}


def tokenizer_of(source: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(SPECIAL, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = source
    return tokenizer


def template_of(source: str) -> Template:
    return make_template("auto", tokenizer_of(source))


def trained(template: Template, encoded: Encoded) -> list[str]:
    """The texts of the runs of trained tokens."""
    runs: list[list[int]] = []
    before = False
    for i, of_answer in zip(encoded.ids, encoded.mask, strict=True):
        if of_answer and not before:
            runs.append([])
        if of_answer:
            runs[-1].append(i)
        before = of_answer
    return [template._tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answers_and_their_stops_are_trained_and_nothing_else(name: str) -> None:
    source, answers, stops = FAMILIES[name]
    template = template_of(source)
    encoded = template.encode(TALK)
    assert trained(template, encoded) == answers
    assert encoded.context_turns == 2 - len(answers)
    assert {template._tokenizer.decode([i]) for i in template.stop_ids} == stops


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_apply_chat_template(name: str) -> None:
    tokenizer = tokenizer_of(FAMILIES[name][0])
    template = make_template("auto", tokenizer)
    talk = [
        {"role": m.role, "content": [{"type": "text", "text": m.content}]}
        if template.in_parts
        else {"role": m.role, "content": m.content}
        for m in TALK
    ]
    ids = tokenizer.apply_chat_template(talk)["input_ids"]
    stop = tokenizer.convert_tokens_to_ids("<|user|>")
    assert template.encode(TALK).ids == ([*ids, stop] if name == "opening" else ids)
    if name not in ("opened",):
        prompt = tokenizer.apply_chat_template(talk[:3], add_generation_prompt=True)["input_ids"]
        assert template.encode_prompt(TALK[:3]) == prompt


def test_marks_are_read_as_transformers_reads_them() -> None:
    tokenizer = tokenizer_of(MARKED)
    found = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in TALK],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    encoded = make_template("auto", tokenizer).encode(TALK)
    assert encoded.ids == found["input_ids"]
    assert encoded.mask == [bool(value) for value in found["assistant_masks"]]


def test_a_prompt_that_begins_a_thought_is_told() -> None:
    template = template_of(OPENED)
    assert "ends in '<think>\\n'" in template.notes[0]
    assert template_of(PLAIN).notes == ()
    text = template._tokenizer.decode(template.encode_prompt(TALK[:1]))
    assert text == "<s><|user|>Q1<|assistant|>"


def test_reasoning_is_trained_where_it_is_written_and_lost_nowhere() -> None:
    template = template_of(THINKING)
    beside = (TALK[0], Message("assistant", "A1", reasoning="why"))
    within = (TALK[0], Message("assistant", "<think>\nwhy\n</think>\n\nA1"))
    for talk in (beside, within):
        expected = ["<think>\nwhy\n</think>\n\nA1<|im_end|>"]
        assert trained(template, template.encode(talk)) == expected
    # Once the conversation goes on, the first answer has lost its reasoning: it is context.
    goes_on = template.encode((*within, *TALK[2:]))
    assert trained(template, goes_on) == ["<think>\n\n</think>\n\nA2<|im_end|>"]
    assert goes_on.context_turns == 1
    with pytest.raises(ValueError, match="leaves out or changes the reasoning of message 2"):
        template_of(PLAIN).encode(beside)
    assert trained(template_of(PLAIN), template_of(PLAIN).encode(within)) == [
        "<think>\nwhy\n</think>\n\nA1<|im_end|>"
    ]
    with pytest.raises(ValueError, match="leaves out or changes the reasoning of message 2"):
        template_of(OPENED).encode(within)


@pytest.mark.parametrize(
    ("source", "talk", "lost"),
    [
        (ROUNDS, (Message("system", "S"), *TALK), "the text of message 1 ('system')"),
        (PLAIN.replace("{{ m.content }}", "{{ m.content[:4] }}"), TALK, ""),
        (
            PLAIN.replace("m.content }}", "m.content | replace('~', '-') }}"),
            (Message("user", "a~b"), TALK[1]),
            "message 1",
        ),
        (
            "{% for m in messages if m.role != 'tool' %}" + PLAIN[len("{% for m in messages %}") :],
            (
                TALK[0],
                Message("assistant", "f()"),
                Message("tool", "RESULT"),
                Message("assistant", "A"),
            ),
            "message 3",
        ),
    ],
)
def test_a_template_that_drops_or_changes_a_text_is_refused(
    source: str, talk: tuple[Message, ...], lost: str
) -> None:
    if not lost:
        with pytest.raises(ValueError, match="leaves out or changes"):
            template_of(source)
        return
    template = template_of(source)
    with pytest.raises(ValueError, match="leaves out or changes") as error:
        template.encode(talk)
    assert lost in str(error.value)


def test_a_template_that_ignores_the_prompt_is_refused() -> None:
    without = PLAIN.split("{% if add_generation_prompt %}")[0]
    with pytest.raises(ValueError, match="ignores add_generation_prompt"):
        template_of(without)


CALLING = (
    Message("user", "Q"),
    Message("assistant", "", calls=(ToolCall("add", '{"a": "one \\"x\\"", "b": 2}', "c1"),)),
    Message("tool", "3", name="add", call_id="c1"),
    Message("assistant", "Three."),
)


def test_calls_are_trained_and_their_results_are_not() -> None:
    thinking = template_of(THINKING).encode(CALLING)
    call = '<tool_call>{"name": "add", "arguments": {"a": "one \\"x\\"", "b": 2}}</tool_call>'
    assert trained(template_of(THINKING), thinking) == [
        f"<think>\n\n</think>\n\n{call}<|im_end|>",
        "<think>\n\n</think>\n\nThree.<|im_end|>",
    ]
    opening = template_of(OPENING)
    assert trained(opening, opening.encode(CALLING)) == [
        '\nadd(a=one "x";b=2;)<|observation|>',
        "\nThree.<|user|>",
    ]
    with pytest.raises(ValueError, match="leaves out or changes a call of message 2"):
        template_of(PLAIN).encode(CALLING)
    for name in ("chatml",):
        tokenizer = byte_tokenizer(("<|im_start|>", "<|im_end|>"))
        with pytest.raises(ValueError, match="message 2 has calls of tools, which the template"):
            make_template(name, tokenizer).encode(CALLING)


def test_tools_are_written_or_refused() -> None:
    tools = json.dumps([{"type": "function", "function": {"name": "add"}}])
    offering = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + PLAIN
    template = template_of(offering)
    assert '"name": "add"' in template._tokenizer.decode(template.encode(TALK, tools).ids)
    with pytest.raises(ValueError, match="leaves out the row's tools"):
        template_of(PLAIN).encode(TALK, tools)


@pytest.mark.parametrize("source", [PLAIN, MARKED, OPENING, ROUNDS])
def test_a_turn_marked_as_not_trained_is_context(source: str) -> None:
    template = template_of(source)
    talk = (TALK[0], Message("assistant", "A1", trained=False), *TALK[2:])
    whole, part = template.encode(TALK), template.encode(talk)
    assert part.ids == whole.ids
    assert trained(template, part) == trained(template, whole)[1:]


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3"])
def test_built_ins_leave_such_a_turn_out_as_well(name: str) -> None:
    control = {
        "chatml": ("<|im_start|>", "<|im_end|>"),
        "llama2": ("<s>", "</s>"),
        "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    }[name]
    template = make_template(name, byte_tokenizer(control))
    talk = (TALK[0], Message("assistant", "A1", trained=False), *TALK[2:])
    assert template.encode(talk).ids == template.encode(TALK).ids
    assert trained(template, template.encode(talk)) == trained(template, template.encode(TALK))[1:]


def test_one_rendering_and_one_encoding_serve_a_long_conversation() -> None:
    template: Any = template_of(PLAIN)
    talk = TALK * 40
    rendered: list[int] = []
    render = template._render
    encoded: list[str] = []
    tokenise = template._tokenise
    template._render = lambda *given, **more: (
        rendered.append(len(given[0])) or render(*given, **more)
    )
    template._tokenise = lambda texts, **more: encoded.extend(texts) or tokenise(texts, **more)
    assert trained(template, template.encode(talk))[:2] == ["A1<|im_end|>", "A2<|im_end|>"]
    # The whole twice, as it is and as a shape; every answer in a window.
    assert sum(size > 20 for size in rendered) == 2
    assert sum(map(len, encoded)) < 2 * len(template._tokenizer.decode(template.encode(talk).ids))
    rendered.clear()
    template.encode(tuple(Message(m.role, m.content * 2) for m in talk))
    assert rendered == [len(talk)]
