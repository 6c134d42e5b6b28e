"""Fields of messages that decide what is trained: obeyed, or refused by name."""

import json
from typing import Any

import pytest

from slap_ds.data.formats import FORMATS, Conversation, Message, recognise
from slap_ds.data.message_fields import ToolCall

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def talk(**more: Any) -> Conversation:
    """Two rounds, the first answer with more fields."""
    return FORMATS["messages"](
        {
            "messages": [
                {"role": "user", "content": "q1"},
                {"role": "assistant", "content": "wrong", **more},
                {"role": "user", "content": "q2"},
                {"role": "assistant", "content": "right"},
            ]
        }
    )


@pytest.mark.parametrize(
    ("field", "value", "trained"),
    [
        ("train", False, False),
        ("train", True, True),
        ("trainable", False, False),
        ("loss", False, False),
        ("loss_mask", 0, False),
        ("loss_mask", 1, True),
        ("weight", 0, False),
        ("weight", 0.0, False),
        ("weight", 1.0, True),
        ("masked", True, False),
        ("masked", False, True),
        ("ignore", 1, False),
        ("train", None, True),
        ("finish_reason", "stop", True),
        ("constraints", "short", True),
    ],
)
def test_a_turn_is_trained_as_its_fields_say(field: str, value: object, trained: bool) -> None:
    assert [m.trained for m in talk(**{field: value}).messages] == [True, trained, True, True]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"weight": 0.5}, "'weight' is 0.5, expected true, false, 0 or 1"),
        ({"train": "no"}, "'train' is 'no', expected true"),
        ({"train": True, "weight": 0}, "train and weight contradict each other"),
        ({"mask": 1}, "has 'mask', which may say whether it is trained"),
        ({"isTrained": False}, "has 'isTrained', which may say"),
        ({"loss_scale": 0}, "has 'loss_scale', which may say"),
        ({"reasoning": ["x"]}, "'reasoning' is a list, expected text"),
        ({"thinking": "a", "reasoning": "b"}, "thinking and reasoning hold different texts"),
        ({"reasoning_details": [{}]}, "has 'reasoning_details', which looks like reasoning"),
        ({"images": ["a.png"]}, "has 'images': only text is trained"),
        ({"tool_calls": {"name": "f"}}, "'tool_calls' is an object, expected a list"),
        ({"tool_calls": ["f(1)"]}, "is text that is no JSON: 'f(1)'"),
        ({"tool_calls": [{"name": "f", "arguments": "x"}]}, "arguments is text that is no JSON"),
        ({"tool_calls": [{"name": "f", "arguments": [1]}]}, "are a list, expected an object"),
        ({"tool_calls": [{"function": {}}]}, "has no name"),
    ],
)
def test_what_is_not_understood_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=r"message 2") as error:
        talk(**fields)
    assert reason in str(error.value)


def test_a_question_cannot_be_trained_call_or_reason() -> None:
    for more, reason in (
        ({"train": True}, "is 'user' and has 'train': only assistant turns are trained"),
        ({"tool_calls": [CALL]}, "is 'user' and has 'tool_calls': only assistants call"),
        ({"reasoning": "hm"}, "is 'user' and has 'reasoning': only assistants reason"),
    ):
        messages = [{"role": "user", "content": "q", **more}, {"role": "assistant", "content": "a"}]
        with pytest.raises(ValueError, match=reason):
            FORMATS["messages"]({"messages": messages})


def test_a_row_of_masked_turns_alone_is_refused() -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    row["messages"][1]["train"] = False  # type: ignore[assignment]
    with pytest.raises(ValueError, match="every assistant turn is marked as not to be trained"):
        FORMATS["messages"](row)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_stands_beside_the_answer(name: str) -> None:
    assert talk(**{name: "hm"}).messages[1] == Message("assistant", "wrong", reasoning="hm")


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"id": "c1", "name": "add", "arguments": {"a": 1, "b": None}}]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": {"id": "c1", **CALL["function"]}},  # type: ignore[dict-item]
    ],
)
def test_calls_of_every_form(fields: dict[str, Any]) -> None:
    first = talk(**fields).messages[1]
    assert first.calls == (ToolCall("add", '{"a": 1}', "c1"),)


def test_sharegpt_calls_are_calls_and_observations_their_results() -> None:
    call = '{"name": "add", "arguments": {"a": 1}}'
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "two"},
        ],
        "tools": '[{"name": "add", "description": "adds"}]',
    }
    found = FORMATS["sharegpt"](row)
    assert found.messages[1] == Message(
        "assistant", "", calls=(ToolCall("add", '{"a": 1}', "", call),)
    )
    assert found.messages[2] == Message("tool", "2")
    assert json.loads(found.tools) == [
        {"type": "function", "function": {"name": "add", "description": "adds"}}
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "TRL's DPOTrainer"),
        ({"messages": [], "chosen": "a", "rejected": "b"}, "TRL's DPOTrainer"),
        ({"prompt": "q", "completion": "bad", "label": False}, "TRL's KTOTrainer"),
        ({"text": "Once upon a time"}, "a row of plain text"),
        ({"prompt": "q", "completion": "a", "weight": 0.5}, "would weigh or mask"),
        ({"prompt": "q", "completion": "a", "loss_mask": [0, 1]}, "would weigh or mask"),
        ({"prompt": "q", "completion": "a", "tools": [{}]}, "a tool in 'tools' has no name"),
        ({"prompt": "q", "completion": "a", "tools": {"a": 1}}, "'tools' is an object, expected"),
    ],
)
def test_rows_of_other_kinds_name_what_takes_them(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=r".+") as error:
        FORMATS[recognise(row)](row)
    assert reason in str(error.value)


def test_empty_fields_of_a_table_mean_nothing() -> None:
    row = {"prompt": "q", "completion": "a", "images": [], "tools": None, "chosen": None}
    found = FORMATS[recognise(row)](row)
    assert (found.tools, found.media) == ("", False)
    assert FORMATS[recognise(row)]({**row, "images": ["a.png"]}).media
