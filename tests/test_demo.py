"""What `make demo` is made of: rows and base model, equal cost, libraries that keep quiet."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from slap_ds.cli import main
from slap_ds.config.file import read_config
from slap_ds.evaluation.answers import Answerer
from slap_ds.jsonl import read_lines
from slap_ds.train.loop import train
from slap_ds.train.run import prepare

ROOT = Path(__file__).parents[1]
LESSONS = ROOT / "slap_ds" / "data" / "lessons"
MAKER = runpy.run_path(str(ROOT / "examples" / "make_demo_base.py"))
EQUAL = runpy.run_path(str(ROOT / "examples" / "equal_cost.py"))["equal_cost_steps"]


def rows(name):
    return [json.loads(line) for line in (LESSONS / name).read_text("utf-8").splitlines()]


def test_the_script_makes_the_same_rows_and_tokenizer(tmp_path):
    MAKER["write_data"](tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"train.jsonl", "eval.jsonl", "tokenizer.json", "tokenizer_config.json"}
    for name in made:
        assert (tmp_path / name).read_bytes() == (LESSONS / name).read_bytes()


def test_rows_repeat_themselves_and_questions_of_the_evaluation_do_not_occur():
    train_rows, exam = rows("train.jsonl"), rows("eval.jsonl")
    distinct = {json.dumps(row["messages"]) for row in train_rows}
    assert 0.1 < 1 - len(distinct) / len(train_rows) < 0.2
    asked = {m["content"] for row in train_rows for m in row["messages"][::2]}
    exams = [row["messages"][0]["content"] for row in exam]
    assert len(set(exams)) == len(exams)
    assert not {q for q in exams for a in asked if q in a}
    # An answer that contradicts its question's answer elsewhere is noise; most rows have none.
    answers = {}
    for row in exam:
        answers[row["task"]] = answers.get(row["task"], set()) | {row["messages"][1]["content"]}
    told = {row["messages"][1]["content"] for row in train_rows}
    new = [a for task in ("symbols", "young", "chinese", "products") for a in answers[task]]
    assert sum(answer in told for answer in new) > 0.95 * len(new)


def test_the_base_knows_the_basics_and_not_what_is_to_be_learnt():
    model = AutoModelForCausalLM.from_pretrained(LESSONS)
    assert str(model.dtype) == "torch.bfloat16"
    assert sum(p.numel() for p in model.parameters()) == 479_904
    answer = Answerer(LESSONS)

    def right(taught):
        sample = [row.turns[0] for row in taught][::17]
        return sum(answer(question) == wanted for question, wanted in sample) / len(sample)

    assert right([row for row in MAKER["base_rows"]() if len(row.turns) == 1]) > 0.8
    assert right([row for row in MAKER["train_rows"]() if row.task in ("chinese", "young")]) < 0.1


def test_steps_at_equal_cost():
    records = [
        {"flops": 70.0, "full_flops": 100.0, "picked": 6, "candidates": 10},
        {"flops": 90.0, "full_flops": 120.0, "picked": 6, "candidates": 10},
    ] * 10
    # 1600 FLOPs are spent; a step of all data costs 110, one of a random 60 % 66.
    assert EQUAL(records, "full") == 15
    assert EQUAL(records, "random") == 24
    with pytest.raises(ValueError, match="'slap', expected one of full, random"):
        EQUAL(records, "slap")


def test_a_quick_demo(tmp_path, capsys):
    """SLAP, then all data and a random part at its cost; the table says what is equal."""

    def run(name, method, steps):
        given = {"run_dir": str(tmp_path / name), "model.path": str(LESSONS), "steps": str(steps)}
        given |= {"selection.method": method, "engine.kind": "torch", "batch.candidates": "10"}
        given |= {"data.train": f"[{LESSONS}/train.jsonl]", "data.eval": f"[{LESSONS}/eval.jsonl]"}
        given |= {"evaluation.max_samples": "20", "data.cache_dir": str(tmp_path / "cache")}
        flags = [part for key, value in given.items() for part in (f"--{key}", value)]
        train(prepare(read_config(str(ROOT / "configs" / "demo.yaml"), flags)))
        return [r for r in read_lines(tmp_path / name / "metrics.jsonl") if r["event"] == "train"]

    slap = run("slap", "slap", 40)
    spent = slap[-1]["total"]["flops"]
    for method in ("full", "random"):
        other = run(method, method, EQUAL(slap, method))
        assert abs(other[-1]["total"]["flops"] / spent - 1) < 0.04

    def titled(*names):
        capsys.readouterr()
        main(["compare", *(str(tmp_path / name) for name in names)])
        return capsys.readouterr().out.split("\n")[0].strip()

    spoil = tmp_path / "random" / "metrics.jsonl"
    lines = [json.loads(line) for line in spoil.read_text("utf-8").splitlines()]
    for line in lines:
        if line["event"] == "train":
            line["total"]["flops"] = 1.01 * spent
    spoil.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    assert titled("slap", "random").endswith("side, at equal cost")
    (tmp_path / "twin").symlink_to(tmp_path / "slap")
    assert titled("slap", "twin").endswith("side, at equal steps and cost")
    run("more", "full", 40)
    assert titled("slap", "more").endswith("side, at equal steps")
    assert titled("random", "more").endswith("side by side")


SPEAKING = """
import logging, sys, warnings
from slap_ds.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
import deepspeed.utils.logging
for where in ("torch.distributed.c10d_logger", "deepspeed.x", "slap_ds.x", "torchlike"):
    warnings.warn_explicit(f"warned in {where}", FutureWarning, where, 1, module=where)
logging.getLogger("DeepSpeed").warning("logged warning")
logging.getLogger("DeepSpeed").error("logged error")
"""


@pytest.mark.parametrize(
    ("given", "loud"),
    [(["settings"], False), (["-v", "settings"], True), (["settings", "--verbose"], True)],
)
def test_libraries_speak_of_errors_alone(given, loud):
    done = subprocess.run(
        [sys.executable, "-c", SPEAKING, *given],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0
    assert "selection.keep" in said
    for always in ("warned in slap_ds.x", "warned in torchlike", "logged error"):
        assert always in said
    for sometimes in ("warned in torch.distributed", "warned in deepspeed", "logged warning"):
        assert (sometimes in said) == loud


def test_wrong_usage_is_told_with_and_without_v(capsys):
    for given in (["settings", "--x"], ["-v", "settings", "--x"]):
        with pytest.raises(SystemExit):
            main(given)
        assert "unknown arguments: --x" in capsys.readouterr().err
