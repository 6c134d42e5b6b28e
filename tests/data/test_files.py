"""Files of every kind that rows come in."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slap_ds.data.formats import (
    Conversation,
    Reject,
    read_conversations,
)
from tests.data.test_formats import GOOD, LINE, ROW, read, rejects
from tests.small_tokenizers import DATA_DIR, needs_data

pytestmark = pytest.mark.lane


def test_a_json_list_loses_only_its_bad_rows(tmp_path: Path) -> None:
    bad_bytes = LINE.replace(b'"q"', b'"\xe4\xb8"')
    rows = [LINE, LINE[:-1] + b', "x": NaN}', bad_bytes, b"3", LINE]
    plain = tmp_path / "rows.json"
    plain.write_bytes(b"\xef\xbb\xbf \n[" + b",\n".join(rows) + b"]\n")
    packed = tmp_path / "packed.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        assert {line: reason.split()[0] for line, reason in rejects(path).items()} == {
            2: "NaN",
            3: "a",
            4: "the",
        }
        assert len(read(path)) == 5


def test_a_json_file_may_hold_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    path.write_bytes(LINE + b"\n" + LINE + b"\n{\n")
    assert len(read(path)) == 3
    assert list(rejects(path)) == [3]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("rows", [ROW, {"data": [ROW]}])
def test_one_object_over_many_lines_is_told_as_such(
    tmp_path: Path, rows: object, indent: int | None
) -> None:
    """On one line it is a row, good or bad."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=indent))
    if indent is None:
        assert len(list(read_conversations([str(path)]))) == 1
        return
    with pytest.raises(ValueError, match=r"rows\.json: .* one object over several lines: write a"):
        list(read_conversations([str(path)]))


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("cut.jsonl.gz", gzip.compress(b"\n".join([LINE] * 9000))[:-20], "damaged archive"),
        ("no.jsonl.gz", LINE, "damaged archive"),
        ("cut.json", b"[" + LINE, "not a JSON list"),
        ("deep.json", b"[" * 100_000, "nested too deep"),
        ("no.parquet", b"PAR1 and no more", "unreadable Parquet file"),
        ("no.csv", b"q,a", "unknown kind of file; expected one that ends in .jsonl.gz"),
    ],
)
def test_a_file_that_cannot_be_read_on_is_an_error(
    name: str, data: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=reason) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


def test_parquet_rows_of_both_kinds_of_messages(tmp_path: Path) -> None:
    turns = [("human", "user", "Hi!"), ("gpt", "assistant", "Hello.")]
    rows = [
        {"conversations": [{"from": f, "value": text} for f, _, text in turns]},
        {"conversations": [{"role": r, "content": text} for _, r, text in turns]},
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert pq.read_table(path).to_pylist()[1]["conversations"][0]["from"] is None
    first, second = read_conversations([str(path)])
    assert isinstance(first, Conversation)
    assert first == second


def test_parquet_rows_with_broken_text_cost_only_themselves(tmp_path: Path) -> None:
    data = b"q1q2\xff\xfeq4"
    offsets = pa.py_buffer(memoryview(b"".join(i.to_bytes(4, "little") for i in (0, 2, 4, 6, 8))))
    prompts = pa.Array.from_buffers(pa.string(), 4, [None, offsets, pa.py_buffer(data)])
    answers = pa.array(["a1", None, "a3", "a4"])
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"instruction": prompts, "output": answers, "n": [1, 2, 3, 4]}), path)
    assert [type(row) for row in read(path)] == [Conversation, Reject, Reject, Conversation]
    assert "found the fields instruction, n" in rejects(path)[2]
    assert "not UTF-8" in rejects(path)[3]


def test_saved_data_sets_folders_and_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = datasets.Dataset.from_list([ROW, {**ROW, "messages": ROW["messages"][:1]}])
    saved.save_to_disk(str(tmp_path / "saved"))
    first, second = read(tmp_path / "saved")
    assert isinstance(first, Conversation)
    assert (first.messages, first.source) == (GOOD, "saved")
    assert isinstance(second, Reject)
    assert (second.line, second.file) == (2, str(tmp_path / "saved"))

    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(
        ValueError, match=r"holds the splits train, test: name one, as .*both/train"
    ):
        read(tmp_path / "both")
    assert len(read(tmp_path / "both" / "train")) == 2

    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "deeper/c.jsonl"):
        (folder / name).write_bytes(LINE)
    (folder / "README.md").write_text("no data")
    sources = [row.source for row in read(folder) if isinstance(row, Conversation)]
    assert sources == ["a", "b"]
    assert len(read(folder / "**" / "*.jsonl")) == 3
    assert len(read(folder / "[ab].jsonl")) == 2
    monkeypatch.chdir(folder)
    assert len(list(read_conversations(["a.jsonl", "deeper/*"]))) == 2


@pytest.mark.parametrize(
    "name",
    [
        "nothing.jsonl",
        "./nothing",
        "here/nothing",
        "a/b/c",
        "/nowhere/nothing",
        "~/nothing-at-all",
        "*.jsonl",
        "here",
        "nothing.json:train",
    ],
)
def test_a_missing_path_is_an_error_and_no_question_to_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no (such )?(file|data files)"):
        list(read_conversations([name]))


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        if "gone" in name:
            raise ConnectionError("no way\nto the hub")
        return datasets.Dataset.from_list([ROW])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_conversations(["someone/data", "someone/data:test[:10%]", "bare"]))
    assert asked == [("someone/data", "train"), ("someone/data", "test[:10%]"), ("bare", "train")]
    assert [row.source for row in rows if isinstance(row, Conversation)] == ["data", "data", "bare"]
    with pytest.raises(ValueError, match=r"someone/gone: no such file .* no way$"):
        list(read_conversations(["someone/gone"]))
    with pytest.raises(ValueError, match="addresses are not read"):
        list(read_conversations(["https://example.org/a.jsonl"]))


def test_arguments_that_cannot_be_meant(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE)
    with pytest.raises(ValueError, match="unknown data format 'alpacca': expected auto, messages"):
        read(tmp_path / "a.jsonl", "alpacca")
    with pytest.raises(ValueError, match="must be a list"):
        list(read_conversations("a.jsonl"))
    with pytest.raises(ValueError, match="it has builtin:demo/train, builtin:demo/eval"):
        list(read_conversations(["builtin:demo"]))
    assert "unknown format" not in rejects(tmp_path / "a.jsonl")
    named = read(tmp_path / "a.jsonl", "alpaca")
    assert [type(row) for row in named] == [Reject]


@pytest.mark.parametrize("part", ["train", "eval"])
def test_the_demo_data_are_read_whole(part: str) -> None:
    rows = list(read_conversations([f"builtin:demo/{part}"]))
    assert len(rows) >= 60
    assert [row for row in rows if isinstance(row, Reject)] == []


@needs_data
def test_real_data_are_read_whole() -> None:
    rows = Counter(
        row.source if isinstance(row, Conversation) else f"{row.file} {row.line} {row.reason}"
        for row in read_conversations([str(DATA_DIR / "**" / "*.jsonl.gz")])
    )
    expected: Counter[str] = Counter()
    for entry in json.loads((DATA_DIR / "manifest.json").read_text("utf-8"))["files"]:
        if entry["side"] == "bundle":
            expected[entry["source"]] += entry["rows"]
    assert rows == expected


def test_a_number_too_long_for_python_costs_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(f'[{json.dumps(ROW)}, {{"a": {"7" * 5000}}}, {json.dumps(ROW)}]')
    assert rejects(path) == {2: "Exceeds the limit of 4300 digits"}
    assert len(read(path)) == 3


def test_a_file_name_that_is_not_utf8_can_be_written_everywhere(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xca\xfd.jsonl"
    Path(os.fsdecode(name)).write_text(json.dumps(ROW) + "\nx\n")
    (found, reject) = read(tmp_path)
    assert isinstance(found, Conversation)
    assert isinstance(reject, Reject)
    assert found.source == "\\xca\\xfd"
