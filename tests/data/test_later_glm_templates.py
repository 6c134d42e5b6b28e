"""GLM-4-0414, GLM-4.5 and GLM-4.7: templates in their families' layouts, by `data.template: auto`.

Written for these tests: what is trained by hand, ids as `apply_chat_template` gives them.
"""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from slap_ds.data.formats import Message
from slap_ds.data.message_fields import ToolCall
from slap_ds.data.own_template import as_dict
from slap_ds.data.templates import make_template
from tests.data.test_chat_templates import trained
from tests.small_tokenizers import byte_tokenizer

ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
SPECIAL = ("<|endoftext|>", "[gMASK]", "<sop>", *ROLES)
WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>")
# System messages first; an observation is a role of its own; the prompt ends in the role's token.
GLM_0414 = (
    "[gMASK]<sop>{%- for m in messages if m.role == 'system' %}<|system|>\n{{ m.content }}"
    "{%- endfor %}{%- for m in messages if m.role != 'system' %}"
    "{%- if m.role == 'user' %}<|user|>\n{{ m.content }}"
    "{%- elif m.role == 'assistant' %}<|assistant|>\n{{ m.content }}"
    "{%- elif m.role == 'observation' %}<|observation|>\n{{ m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Thinks, or says that it does not; thoughts before the last question are dropped.
GLM_45 = (
    "[gMASK]<sop>{%- if tools -%}<|system|>\n# Tools\n<tools>\n"
    "{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}\n{% endfor %}</tools>"
    "{%- endif -%}"
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 -%}{%- endif %}{%- endfor %}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}<|user|>\n{{ m.content }}"
    "{{- '/nothink' if enable_thinking is defined and not enable_thinking"
    " and not m.content.endswith('/nothink') else '' -}}"
    "{%- elif m.role == 'assistant' -%}<|assistant|>"
    "{%- set thought = '' -%}{%- set said = m.content -%}"
    "{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}"
    "{%- elif '</think>' in said -%}"
    "{%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{%- if loop.index0 > ns.last and thought -%}{{ '\n<think>' + thought.strip() + '</think>' }}"
    "{%- else -%}{{ '\n<think></think>' }}{%- endif -%}"
    "{%- if said.strip() -%}{{ '\n' + said.strip() }}{%- endif -%}"
    "{%- for call in m.tool_calls or [] -%}{%- set call = call.function -%}"
    "{{ '\n<tool_call>' + call.name + '\n' }}{%- for k, v in call.arguments.items() -%}"
    "<arg_key>{{ k }}</arg_key>\n<arg_value>"
    "{{ v if v is string else v | tojson(ensure_ascii=False) }}</arg_value>\n{% endfor -%}"
    "</tool_call>{%- endfor -%}"
    "{%- elif m.role == 'tool' -%}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|observation|>{%- endif -%}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}"
    "{%- elif m.role == 'system' -%}<|system|>\n{{ m.content }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>"
    "{{- '\n<think></think>' if enable_thinking is defined and not enable_thinking else '' -}}"
    "{%- endif -%}"
)
# The prompt itself opens the thought, or closes it unthought; no line breaks.
GLM_47 = (
    "[gMASK]<sop>{%- set ns = namespace(last=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 -%}{%- endif %}{%- endfor %}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}<|user|>{{ m.content }}"
    "{%- elif m.role == 'assistant' -%}<|assistant|>"
    "{%- set thought = m.reasoning_content if m.reasoning_content is string else '' -%}"
    "{%- if loop.index0 > ns.last and thought -%}{{ '<think>' + thought.strip() + '</think>' }}"
    "{%- else -%}{{ '</think>' }}{%- endif -%}{{ m.content.strip() }}"
    "{%- for call in m.tool_calls or [] -%}{%- set call = call.function -%}"
    "{{ '<tool_call>' + call.name }}{%- for k, v in call.arguments.items() -%}"
    "<arg_key>{{ k }}</arg_key><arg_value>"
    "{{ v if v is string else v | tojson(ensure_ascii=False) }}</arg_value>{%- endfor -%}"
    "</tool_call>{%- endfor -%}"
    "{%- elif m.role == 'tool' -%}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|observation|>{%- endif -%}"
    "{{- '<tool_response>' + m.content + '</tool_response>' -}}"
    "{%- else -%}<|system|>{{ m.content }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>"
    "{{- '</think>' if enable_thinking is defined and not enable_thinking else '<think>' -}}"
    "{%- endif -%}"
)
TALK = (
    Message("system", "Be brief."),
    Message("user", "Q1"),
    Message("assistant", "A1"),
    Message("user", "Q2"),
    Message("assistant", "A2"),
)
THOUGHT = (Message("user", "Q"), Message("assistant", "A", reasoning="why"))
CALL = ToolCall("add", '{"a": "one", "b": 2}', "c1")
CALLS = (
    Message("user", "Q"),
    Message("assistant", "", calls=(CALL,)),
    Message("tool", "3", name="add", call_id="c1"),
    Message("assistant", "Three."),
)


def tokenizer_of(source: str) -> PreTrainedTokenizerFast:
    nothink = ("/nothink",) if "nothink" in source else ()
    tokenizer = byte_tokenizer((*SPECIAL, *nothink), eos_token="<|endoftext|>")
    if "think" in source:
        tokenizer.add_tokens(list(WORDS))
    tokenizer.chat_template = source
    return tokenizer


def applied(tokenizer, talk, tools="", **named):
    rows = [as_dict(message) for message in talk]
    offer = json.loads(tools) if tools else None
    return tokenizer.apply_chat_template(rows, tools=offer, **named)["input_ids"]


def answers(source, talk, tools=""):
    """What is trained of a conversation, checked against transformers' own ids."""
    tokenizer = tokenizer_of(source)
    template = make_template("auto", tokenizer)
    found = template.encode(talk, tools)
    ids = applied(tokenizer, talk, tools)
    assert found.ids[: len(ids)] == ids
    assert len(found.ids) == len(ids) + 1  # the token at which the last answer stops
    return trained(template, found)


def stops(source):
    template = make_template("auto", tokenizer_of(source))
    return {template._tokenizer.decode([i]) for i in template.stop_ids}


def test_glm_4_0414_is_written_as_glm4():
    assert make_template("auto", tokenizer_of(GLM_0414)).name == "glm4"
    assert answers(GLM_0414, TALK) == ["\nA1<|user|>", "\nA2<|endoftext|>"]
    assert stops(GLM_0414) == {"<|endoftext|>", "<|user|>", "<|observation|>"}


@pytest.mark.parametrize(
    ("source", "first", "last"),
    [
        (GLM_45, "\n<think></think>\nA1<|user|>", "\n<think></think>\nA2<|user|>"),
        (GLM_47, "A1<|user|>", "A2<|user|>"),
    ],
    ids=["4.5", "4.7"],
)
def test_an_answer_without_a_thought(source, first, last):
    assert make_template("auto", tokenizer_of(source)).name == "auto"
    assert answers(source, TALK) == [first, last]
    assert stops(source) == {"<|user|>", "<|observation|>"}


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (GLM_45, ["\n<think>why</think>\nA<|user|>"]),
        (GLM_47, ["why</think>A<|user|>"]),
    ],
    ids=["4.5", "4.7"],
)
def test_a_thought_is_trained(source, wanted):
    assert answers(source, THOUGHT) == wanted


@pytest.mark.parametrize(
    ("source", "last"),
    [(GLM_45, "\n<think></think>\nA2<|user|>"), (GLM_47, "A2<|user|>")],
    ids=["4.5", "4.7"],
)
def test_an_answer_whose_thought_is_dropped_is_context(source, last):
    assert answers(source, (*THOUGHT, *TALK[3:])) == [last]


@pytest.mark.parametrize(
    ("source", "call", "last"),
    [
        (
            GLM_45,
            "\n<think></think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>one</arg_value>\n"
            "<arg_key>b</arg_key>\n<arg_value>2</arg_value>\n</tool_call><|observation|>",
            "\n<think></think>\nThree.<|user|>",
        ),
        (
            GLM_47,
            "<tool_call>add<arg_key>a</arg_key><arg_value>one</arg_value>"
            "<arg_key>b</arg_key><arg_value>2</arg_value></tool_call><|observation|>",
            "Three.<|user|>",
        ),
    ],
    ids=["4.5", "4.7"],
)
def test_calls_stop_at_the_observation(source, call, last):
    assert answers(source, CALLS) == [call, last]


def test_tools_of_glm_45():
    tools = json.dumps([{"type": "function", "function": {"name": "add"}}])
    assert len(answers(GLM_45, CALLS, tools)) == 2


def test_a_user_may_forbid_the_thought():
    """The one control token that a user writes: at the end of a question, as the template would."""
    forbidden = (Message("user", "Q/nothink"), Message("assistant", "A"))
    assert answers(GLM_45, forbidden) == ["\n<think></think>\nA<|user|>"]
    tokenizer = tokenizer_of(GLM_45)
    prompt = make_template("auto", tokenizer).encode_prompt(forbidden[:1])
    asked = applied(tokenizer, [Message("user", "Q")], add_generation_prompt=True)
    assert prompt == [*asked[:-1], tokenizer.convert_tokens_to_ids("/nothink"), asked[-1]]
    for talk in (
        (Message("user", "a/nothink b"), Message("assistant", "A")),
        (Message("user", "Q"), Message("assistant", "A/nothink")),
    ):
        with pytest.raises(ValueError, match="holds '/nothink'"):
            answers(GLM_45, talk)
