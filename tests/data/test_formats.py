"""Reading of instruction data: every row comes out, as a conversation or as a reject."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slap_ds.data.formats import (
    FORMATS,
    Conversation,
    Message,
    Reject,
    read_conversations,
    recognise,
)

pytestmark = pytest.mark.lane

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
GOOD = (Message("user", "q"), Message("assistant", "a"))
LINE = json.dumps(ROW).encode()


def contents(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def read(path: Path, format: str = "auto") -> list[Conversation | Reject]:
    return list(read_conversations([str(path)], format))


def rejects(path: Path) -> dict[int, str]:
    return {row.line: row.reason for row in read(path) if isinstance(row, Reject)}


EXAMPLES: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    (
        "messages",
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "call", "tool_calls": None, "weight": 1},
                {"role": "tool", "content": "result"},
                {"role": "tool", "content": "another"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "thanks"},
            ]
        },
        [
            ("system", "s"),
            ("user", "q"),
            ("assistant", "call"),
            ("tool", "result"),
            ("tool", "another"),
            ("assistant", "a"),
            ("user", "thanks"),
        ],
    ),
    (
        "sharegpt",
        {
            "system": "s",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        },
        [("system", "s"), ("user", "q"), ("assistant", "a")],
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "f()"},
                {"role": "observation", "content": "1"},
                {"role": "assistant", "content": "a"},
            ]
        },
        [("user", "q"), ("assistant", "f()"), ("tool", "1"), ("assistant", "a")],
    ),
    (
        "alpaca",
        {
            "instruction": "q",
            "input": "x",
            "output": "a",
            "system": "s",
            "history": [["q1", "a1"], ["q2", "a2"]],
        },
        [
            ("system", "s"),
            ("user", "q1"),
            ("assistant", "a1"),
            ("user", "q2"),
            ("assistant", "a2"),
            ("user", "q\nx"),
            ("assistant", "a"),
        ],
    ),
    (
        "alpaca",
        {"instruction": "q", "input": "", "output": "a", "system": None, "history": None},
        [("user", "q"), ("assistant", "a")],
    ),
    (
        "prompt_completion",
        {"prompt": " q\n", "completion": " a", "messages": None},
        [("user", " q\n"), ("assistant", " a")],
    ),
]


@pytest.mark.parametrize(("name", "row", "expected"), EXAMPLES)
def test_formats_give_the_messages_that_they_mean(
    name: str, row: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert recognise(row) == name
    assert contents(FORMATS[name](row)) == expected


def test_labels_are_taken_where_they_are_text() -> None:
    found = FORMATS["messages"]({**ROW, "task": "qa", "source": 3, "lang": None})
    assert (found.task, found.source, found.lang) == ("qa", "", "")


def test_an_unknown_row_names_its_fields_and_the_known_formats() -> None:
    with pytest.raises(ValueError, match=r"fields answer, body; known formats: messages .*alpaca"):
        recognise({"body": "x", "answer": "y", "prompt": None})


def turn(role: object, content: object = "x", **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


BAD_MESSAGES = [
    ([turn("user", 3), turn("assistant")], "message 1: 'content' is a number, expected text"),
    ([turn("user", None), turn("assistant")], "message 1: 'content' is missing"),
    ([turn("user"), turn("assistant", " \n")], "message 2: 'content' is empty"),
    ([turn("user"), turn("assistant", ["x"])], "message 2: 'content' is a list"),
    ([turn("user"), turn("robot")], "message 2: unknown role 'robot'"),
    ([turn("user"), turn(7)], "message 2: 'role' is a number"),
    ([turn("user"), "x"], "message 2 is text, expected an object"),
    ([turn("user")], "no assistant turn"),
    ([], "no assistant turn"),
    ("x", "'messages' is text, expected a list"),
    ([turn("assistant")], "message 1 is 'assistant' after the start, expected system or user"),
    (
        [turn("user"), turn("assistant"), turn("assistant")],
        "message 3 is 'assistant' after assistant, expected user or tool",
    ),
    ([turn("user"), turn("user"), turn("assistant")], "message 2 is 'user' after user"),
    ([turn("user"), turn("system"), turn("assistant")], "message 2 is 'system' after user"),
    ([turn("user"), turn("tool"), turn("assistant")], "message 2 is 'tool' after user"),
    ([turn("user"), turn("assistant", tool_calls=[{}])], "call 1 of 'tool_calls' has no name"),
    ([turn("user"), turn("assistant", weight=0.5)], "message 2: 'weight' is 0.5, expected"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD_MESSAGES)
def test_bad_messages_are_refused_with_the_place(messages: object, reason: str) -> None:
    with pytest.raises(ValueError, match=r".+") as error:
        FORMATS["messages"]({"messages": messages})
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "q", "output": ""}, "'output' is empty"),
        ({"instruction": "q", "output": "a", "input": 3}, "'input' is a number"),
        ({"instruction": "q", "output": "a", "history": "x"}, "'history' is text"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "turn 1 of 'history' is not a"),
        ({"prompt": "q", "completion": ["a"]}, "'completion' is a list"),
    ],
)
def test_other_bad_rows(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FORMATS[recognise(row)](row)


def test_each_bad_line_is_rejected_with_its_number_and_good_ones_are_kept(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbf" + LINE,
        LINE + b"\r",
        b"",
        b'{"messages": ',
        LINE.replace(b'"q"', b'"\xff"'),
        LINE[:-1] + b', "score": NaN}',
        LINE[:-1] + b', "score": -Infinity}',
        LINE.replace(b'"q"', b'"\\ud800"'),
        LINE[:-1] + b', "task": "x", "task": "y"}',
        b"[" * 200_000 + b"]" * 200_000,
        LINE[:-1] + b', "deep": ' + b"[" * 100 + b"]" * 100 + b"}",
        LINE[:-1] + b', "n": ' + b"9" * 5000 + b"}",
        LINE.replace(b'"q"', b'"' + b"q" * (17 * 2**20) + b'"'),
        b"[1, 2]",
        LINE.replace(b'"q"', b'"q\x00"'),
        '{"messages": [{"role": "user", "content": "a\u2028b\x85c"}, '
        '{"role": "assistant", "content": "\u2029"}, 1]}'.encode(),
        LINE.replace(b'"q"', '"q\u2028r\u0085s"'.encode()),
        LINE + LINE,
        b"   ",
        LINE,
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = {row.line: row for row in read(path) if isinstance(row, Reject)}
    assert all(row.file == str(path) for row in found.values())
    expected = {
        4: "not JSON: Expecting value",
        5: "not UTF-8: byte",
        6: "NaN is not JSON",
        7: "-Infinity is not JSON",
        8: "half a surrogate pair",
        9: "a key is repeated",
        10: "nested deeper than 64",
        11: "nested deeper than 64",
        12: "Exceeds the limit",
        13: "longer than 16 MiB",
        14: "the row is a list",
        15: "not JSON: Invalid control character",
        16: "message 2: 'content' is empty",
        18: "not JSON: Extra data",
    }
    assert found.keys() == expected.keys()
    assert {line for line in expected if expected[line] not in found[line].reason} == set()
    good = [row for row in read(path) if isinstance(row, Conversation)]
    assert [contents(row)[0][1] for row in good] == ["q", "q", "q\u2028r\u0085s", "q"]
    assert {row.source for row in good} == {"mixed"}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from([LINE, b"", b" \t", b"{}", b"null", b'"\\udc00"', b"\x1f", b"\x0b"]),
        ),
        max_size=8,
    )
)
def test_any_bytes_give_one_result_for_each_line_that_is_not_blank(
    lines: list[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    whole = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [number for number, line in enumerate(whole, 1) if line.strip()]
    found = read(path)
    assert len(found) == len(expected)
    bad = [row.line for row in found if isinstance(row, Reject)]
    assert bad == [number for number in expected if whole[number - 1].strip() != LINE]


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(turns=st.lists(st.tuples(text, text), min_size=1, max_size=4), escape=st.booleans())
def test_any_text_comes_back_as_it_was_written(
    turns: list[tuple[str, str]], escape: bool, tmp_path: Path
) -> None:
    messages = [
        {"role": role, "content": content}
        for pair in turns
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    path = tmp_path / "any.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(json.dumps({"messages": messages}, ensure_ascii=escape).encode())
    (found,) = read(path)
    assert isinstance(found, Conversation)
    assert contents(found) == [(m["role"], m["content"]) for m in messages]
