"""What the pages show of runs; that data are never markup; and how a browser lays them out."""

import json
import re
import threading
import time

import pytest

from slap_ds.cli import main
from slap_ds.data.reread import reread_few
from slap_ds.data.samples import Rules
from slap_ds.data.templates import make_template
from slap_ds.jsonl import read_lines
from slap_ds.report.build import report, watch
from slap_ds.report.page import table, verdict
from slap_ds.report.run_head import is_running
from slap_ds.train.inputs import read_inputs
from tests.recipes import run_config, tiny_config, tiny_model
from tests.report.browser import CHROMIUM, OVERFLOWING, browser, look

SCRIPT = "<script>document.title = 'planted'</script>"
WIDE = "a-word-that-nothing-breaks-" * 8
ANSWERS = 40


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folders of a run on hostile data and of one with a long name, config of the first)."""
    root = tmp_path_factory.mktemp("pages")
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Question {i} {SCRIPT} {WIDE}"},
                {"role": "assistant", "content": f"Answer {i}.\n{SCRIPT}"},
            ],
            "task": SCRIPT if i % 2 else WIDE,
        }
        for i in range(ANSWERS)
    ]
    rows[3]["messages"][1]["content"] = "long " * 400  # loses its answer, and is dropped
    rows[5] = {"messages": SCRIPT}  # is rejected
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_model(root / "model")
    folders = []
    for name in ("run", f"other-{WIDE[:120]}"):
        config = tiny_config(
            model,
            root / name,
            engine={"kind": "torch"},
            steps=6,
            batch={"candidates": 16},
            data={"train": [str(root / "rows.jsonl")], "eval": [str(root / "rows.jsonl")]},
            evaluation={"every": 2},
            checkpoint={"every": 3},
        )
        run_config(config)
        folders.append(root / name)
    return folders, tiny_config(model, folders[0], data=config.data.model_dump())


def text_of(page):
    return page.read_text("utf-8").replace("\u00a0", " ")


def test_the_top_says_what_was_trained_and_evaluations_stand_at_their_step(runs, tmp_path):
    (folder, _), _ = runs
    text = text_of(report([folder], tmp_path))
    (start,) = read_lines(folder / "starts.jsonl")
    records = read_lines(folder / "metrics.jsonl")
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert facts["State"] == "finished, 6 steps"
    assert facts["Method"] == "slap, keep 0.6; 16 candidates a step"
    assert facts["Ranks"] == "1 rank, CPU"
    assert facts["Model"].endswith(f"llama, {start['parameters'] / 1e3:.0f} k parameters")
    assert "1 row of the training data (rejects.jsonl)" in facts["Rejects"]
    assert "1 without a token to train" in facts["Rejects"]
    assert facts["Peak memory"] == "not counted on a CPU"
    assert f"torch {start['versions']['torch']}" in facts["Versions"]
    elapsed = [r["elapsed_s"] for r in records]
    assert elapsed == sorted(elapsed)
    assert elapsed[-1] >= sum(r["step_s"] for r in records if r["event"] == "train")
    evals = [r for r in records if r["event"] == "eval"]
    for steps, record in zip(("0, before training", 2, 4, 6), evals, strict=True):
        assert f"<td>{steps}</td><td>{record['eval_loss']:.4f}</td>" in text
    assert not re.search(r"\d\.\d{6}", re.sub(r'src="[^"]*"', "", text))


def test_a_second_start_is_told_and_its_time_added(runs, tmp_path):
    _, config = runs
    again = config.model_copy(update={"run_dir": str(tmp_path / "run"), "steps": 6})
    again = again.model_copy(update={"engine": again.engine.model_copy(update={"kind": "torch"})})
    run_config(again)
    more = again.model_copy(update={"steps": 8})
    run_config(more)
    assert [r["step"] for r in read_lines(tmp_path / "run" / "starts.jsonl")] == [0, 6]
    elapsed = [r["elapsed_s"] for r in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert elapsed == sorted(elapsed)
    assert "2 starts" in text_of(report([tmp_path / "run"]))


def test_conversations_are_whole_with_roles_and_those_the_picks_say(runs, tmp_path):
    (folder, _), _ = runs
    text = text_of(report([folder], tmp_path))
    shown = re.findall(r"<article.*?</article>", text, re.S)
    assert shown
    times = {}
    for record in read_lines(folder / "picks.jsonl"):
        for number in record["ids"]:
            times[number] = times.get(number, 0) + 1
    assert f"trained {max(times.values())} of" in shown[0]
    for article in shown:
        roles = re.findall(r'<h4 class="(\w+)">', article)
        assert roles == ["system", "user", "assistant"]
        number = re.search(r"Question (\d+)", article)[1]
        assert f"Answer {number}.\n&lt;script&gt;" in article


def test_few_rows_are_found_past_rejects_and_dropped_ones(runs):
    _, config = runs
    inputs = read_inputs(config, write_rejects=False)
    assert len(inputs.train) == ANSWERS - 2
    rules = Rules.of(config.data, make_template("auto", inputs.tokenizer))
    found = reread_few(inputs.train, [0, 2, 3, 4, 37], config.data.train, rules)
    questions = {i: int(talk.messages[1].content.split()[1]) for i, talk in found.items()}
    assert questions == {0: 0, 2: 2, 3: 4, 4: 6, 37: 39}


def test_data_are_never_markup(runs, tmp_path):
    folders, _ = runs
    for out, given in ((tmp_path / "one", folders[:1]), (tmp_path / "two", folders)):
        text = text_of(report(given, out))
        assert "<script" not in text
        assert "&lt;script&gt;" in text
    assert "<b>" not in table(["<b>"], [["<b>"], ["<b>", 1]])


def test_data_that_are_gone_are_said_to_be(runs, tmp_path):
    (folder, _), _ = runs
    for path in folder.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("rows.jsonl", "gone.jsonl"))
    text = text_of(report([tmp_path]))
    assert "data can no longer be read" in text
    assert "gone.jsonl" in text
    assert "<article" not in text


def test_several_runs_and_what_is_refused(runs, tmp_path, capsys):
    folders, _ = runs
    both = [str(folder) for folder in folders]
    main(["report", *both, "--out", str(tmp_path)])
    text = text_of(tmp_path / "index.html")
    assert "<h1>2 runs</h1>" in text
    assert all(f"<summary>{folder.name}</summary>" in text for folder in folders)
    with pytest.raises(ValueError, match="--out FOLDER"):
        report(folders)
    with pytest.raises(FileNotFoundError, match="neither a run"):
        report([folders[0], tmp_path], tmp_path)


def test_watch_writes_until_the_run_ends(runs, tmp_path):
    (folder, _), _ = runs
    for path in folder.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    heart = tmp_path / "heartbeat" / "rank-0.json"
    heart.parent.mkdir()
    metrics = tmp_path / "metrics.jsonl"
    whole = metrics.read_text()
    lines = whole.splitlines(keepends=True)
    metrics.write_text("")  # nothing yet
    beat = {"exit": None, "time": time.time()}
    heart.write_text(json.dumps(beat))
    assert is_running(tmp_path)
    told = []
    thread = threading.Thread(target=watch, args=([tmp_path], None, 1, told.append))
    thread.start()
    page = tmp_path / "report" / "index.html"

    def until(happened):
        end = time.monotonic() + 60
        while not happened():
            assert time.monotonic() < end
            time.sleep(0.1)

    until(lambda: told)
    metrics.write_text("".join(lines[:3]))
    until(page.is_file)
    assert 'http-equiv="refresh" content="1"' in text_of(page)
    assert "trains, 2 of 6 steps" in text_of(page)
    metrics.write_text(whole)
    heart.write_text(json.dumps({**beat, "exit": 0}))
    thread.join(60)
    assert told == [
        "waits for the first step",
        f"wrote {page}, and again every 1 s until the run ends",
    ]
    assert "refresh" not in text_of(page)
    assert "finished, 6 steps" in text_of(page)
    heart.write_text(json.dumps({**beat, "time": time.time() - 3600}))
    assert not is_running(tmp_path)


def test_verdicts_say_in_words_and_marks_what_they_say_in_colour():
    assert verdict("better") == '<span class="verdict good">▼ better</span>'
    assert verdict("worse") == '<span class="verdict bad">▲ worse</span>'
    assert "undecided" in table(["", ""], [["a", verdict("undecided")]])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (CONTRIBUTING.md)")
def test_a_browser_finds_nothing_that_overflows_and_no_error(runs, tmp_path):
    folders, _ = runs
    pages = [report(folders[:1], tmp_path / "one"), report(folders, tmp_path / "several")]
    wide = tmp_path / "wide.html"
    wide.write_text(f"<body><p style='white-space: nowrap'>{WIDE * 9}</p><script>x()</script>")
    with browser() as tab:
        for page in pages:
            look(tab, page)
            assert tab.evaluate("document.title") != "planted"
        assert tab.complaints == []
        tab.open(wide, 400, "light")  # and it would see both
        assert "the page" in tab.evaluate(OVERFLOWING)
        assert len(tab.complaints) == 1
