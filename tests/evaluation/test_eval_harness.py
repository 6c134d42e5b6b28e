"""`slap-ds eval --lm-eval` on a local model and a local task, without a network."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slap_ds.cli import main
from slap_ds.models.load import DEMO_TOKENIZER
from tests.recipes import tiny_model

ROWS = [
    {"question": "2 + 2 =", "choices": [" 4", " 5"], "label": 0},
    {"question": "The sky is", "choices": [" green", " blue", " a car"], "label": 1},
    {"question": "你好", "choices": [" 再见", "，你好"], "label": 1},
    {"question": "One, two,", "choices": [" four", " three"], "label": 1},
    {"question": "Cats and", "choices": [" dogs", " the"], "label": 0},
]
TASK = """
task: a_local_task  # in the test's folder
dataset_path: json
dataset_kwargs:
  data_files: {rows}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def model(tmp_path):
    folder = tiny_model(tmp_path / "model")
    AutoTokenizer.from_pretrained(DEMO_TOKENIZER).save_pretrained(folder)
    return folder


def likelihood(model, tokenizer, question: str, choice: str) -> float:
    before = tokenizer(question, add_special_tokens=False)["input_ids"]
    ids = tokenizer(question + choice, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_p[i - 1, ids[i]]) for i in range(len(before), len(ids)))


@pytest.mark.slow
def test_a_local_task_equals_the_likelihoods_by_hand(model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install lm_eval)")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    (tmp_path / "tasks").mkdir()
    task = tmp_path / "tasks" / "local.yaml"
    task.write_text(TASK.format(rows=rows), "utf-8")
    main(["eval", model, "--lm-eval", str(task), "--out", str(tmp_path / "out")])

    found = json.loads((tmp_path / "out" / "lm_eval.json").read_text("utf-8"))
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    right = 0
    for row in ROWS:
        scores = [likelihood(lm, tokenizer, row["question"], c) for c in row["choices"]]
        right += max(range(len(scores)), key=scores.__getitem__) == row["label"]
    assert found["results"]["a_local_task"]["acc,none"] == pytest.approx(right / len(ROWS))
    assert found["n-samples"]["a_local_task"]["effective"] == len(ROWS)
    assert "a_local_task" in capsys.readouterr().out

    with pytest.raises(SystemExit):
        main(["eval", model, "--lm-eval", "no_such_task_here"])
    assert "knows no task no_such_task_here" in capsys.readouterr().err


def test_without_lm_eval_it_says_so(model, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(SystemExit) as caught:
        main(["eval", model, "--lm-eval", "arc_easy"])
    assert caught.value.code == 1
    assert "slap_ds[harness]" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--lm-eval-limit", "3"], ["--lm-eval-chat"]])
def test_its_options_alone_are_a_mistake(given, model, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["eval", model, "--data", "builtin:demo/eval", *given])
    assert caught.value.code == 1
    expected = f"slap-ds: error: {given[0]} is for lm-evaluation-harness: give --lm-eval TASKS too"
    assert capsys.readouterr().err == expected + "\n"
