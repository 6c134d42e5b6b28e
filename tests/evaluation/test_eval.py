"""`slap-ds eval`, end to end on tiny models, against plain transformers and the run's own loss."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from slap_ds.answers.greedy import batches
from slap_ds.checkpoint.export import export
from slap_ds.cli import main
from slap_ds.evaluation import answers as answers_module
from slap_ds.evaluation.answers import Answerer
from slap_ds.evaluation.subject import open_subject
from slap_ds.jsonl import read_lines
from slap_ds.models.glm.convert import convert_chatglm
from tests import chatglm
from tests.evaluation.test_judge import KEY, longer, prefers, server
from tests.recipes import tiny_config, tiny_model

DATA = "builtin:demo/eval"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("eval")


def train(folder: Path, name: str, **sections) -> Path:
    config = tiny_config(
        str(folder / "base"),
        folder / name,
        steps=4,
        engine={"kind": "torch"},
        evaluation={"max_samples": None},
        optimizer={"lr": 1e-2, "warmup_steps": 0},
        **sections,
    )
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    main(["train", str(folder / f"{name}.yaml")])
    return folder / name


@pytest.fixture(scope="module")
def run(folder):
    demo = Path(answers_module.__file__).parents[1] / "data" / "demo"
    tiny_model(folder / "base")
    tiny_model(folder / "base-with-tokenizer")
    AutoTokenizer.from_pretrained(demo).save_pretrained(folder / "base-with-tokenizer")
    return train(folder, "run")


@pytest.fixture(scope="module")
def model(run, folder):
    return export(run, folder / "model")


def fails(capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.count("slap-ds: error") == 1
    return error


def evaluated(target, out, *more) -> dict:
    main(["eval", str(target), "--out", str(out), *map(str, more)])
    return json.loads((out / "eval.json").read_text("utf-8"))


def plain_answer(folder, messages, new) -> str:
    """transformers alone: the exported chat template, one prompt, the largest logit each time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    start, stops = len(ids), set(model.generation_config.eos_token_id)
    for _ in range(new):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_a_run_is_evaluated(run, model, tmp_path, capsys):
    result = evaluated(run, tmp_path, "--samples", 3, "--max-new-tokens", 8)
    shown = capsys.readouterr().out
    assert "translation" in shown
    assert "distinct_2" in shown

    of_the_run = [r for r in read_lines(run / "metrics.jsonl") if r["event"] == "eval"][-1]
    assert result["loss"]["all"]["loss"] == pytest.approx(of_the_run["eval_loss"], rel=1e-4)
    for task, loss in of_the_run["eval_loss_by_task"].items():
        assert result["loss"]["by_task"][task]["loss"] == pytest.approx(loss, rel=1e-4)
    turns = result["loss"]["dialogue_by_turn"].values()
    dialogue = result["loss"]["by_task"]["dialogue"]
    assert sum(t["response_tokens"] for t in turns) == dialogue["response_tokens"]
    assert len(turns) == 2
    assert result["step"] == 4
    assert result["versions"]["sacrebleu"]

    lines = read_lines(tmp_path / "predictions.jsonl")
    assert sorted({line["task"] for line in lines}) == ["dialogue", "general", "qa", "translation"]
    assert [entry["count"] for entry in result["answers"]["by_task"].values()] == [3] * 4
    assert sum(entry["count"] for entry in result["answers"]["by_source"].values()) == 12
    for line in lines[::3]:
        assert line["prediction"] == plain_answer(model, line["prompt"], 8)
        assert line["reference"]
        assert line["prompt"][-1]["role"] == "user"
    qa = [line["metrics"] for line in lines if line["task"] == "qa"]
    by_task = result["answers"]["by_task"]["qa"]["metrics"]
    assert by_task["f1"] == {"value": sum(m["f1"] for m in qa) / 3, "count": 3}
    assert not list(tmp_path.glob(".model-*"))


def test_losses_alone_leave_the_answers_that_are_there(model, tmp_path):
    data = ("--data", DATA)
    whole = evaluated(model, tmp_path, *data, "--samples", 1, "--max-new-tokens", 3)
    written = (tmp_path / "predictions.jsonl").read_bytes()
    again = evaluated(model, tmp_path, *data, "--samples", 0)
    assert again["answers"] == whole["answers"]
    assert again["settings"] == whole["settings"]
    assert again["loss"] == whole["loss"]
    assert (tmp_path / "predictions.jsonl").read_bytes() == written


def test_the_exported_model_gives_the_same_and_the_same_again(run, model, tmp_path):
    limits = ("--samples", 2, "--max-new-tokens", 6)
    of_run = evaluated(run, tmp_path / "run", *limits)
    of_model = evaluated(model, tmp_path / "a", "--data", DATA, "--max-tokens", 256, *limits)
    again = evaluated(model, tmp_path / "b", "--data", DATA, "--max-tokens", 256, *limits)
    assert of_model["answers"] == of_run["answers"]
    assert of_model["loss"] == of_run["loss"]
    assert again == of_model
    first, second = ((tmp_path / n / "predictions.jsonl").read_bytes() for n in "ab")
    assert first == second


def test_a_second_start_answers_only_what_is_missing(model, tmp_path, monkeypatch):
    arguments = ("--data", DATA, "--samples", 4, "--max-new-tokens", 6, "--batch-tokens", 120)
    whole = evaluated(model, tmp_path, *arguments)
    path = tmp_path / "predictions.jsonl"
    text = path.read_text("utf-8")
    lines = text.split("\n")[:-1]
    # What a crash leaves: some answers without metrics, and one cut short.
    path.write_text("\n".join([*lines[2:-1], lines[-1][:40]]), "utf-8")
    asked = []
    answer = Answerer.answer

    def counted(self, prompts, new):
        asked.append(len(prompts))
        return answer(self, prompts, new)

    monkeypatch.setattr(Answerer, "answer", counted)
    assert evaluated(model, tmp_path, *arguments) == whole
    assert path.read_text("utf-8") == text
    assert 3 <= sum(asked) < len(lines)
    asked.clear()
    assert evaluated(model, tmp_path, *arguments) == whole
    assert not asked


def test_more_samples_keep_the_answers_there_are(model, tmp_path):
    few = evaluated(model, tmp_path, "--data", DATA, "--samples", 1, "--max-new-tokens", 4)
    known = {line["id"]: line for line in read_lines(tmp_path / "predictions.jsonl")}
    more = evaluated(model, tmp_path, "--data", DATA, "--samples", 3, "--max-new-tokens", 4)
    now = {line["id"]: line for line in read_lines(tmp_path / "predictions.jsonl")}
    assert few["answers"]["predictions"] == len(known) == 4
    assert more["answers"]["predictions"] == 12
    assert all(now[i]["prediction"] == line["prediction"] for i, line in known.items())


PROMPTS = [
    "Hello",
    "你好，今天天气怎么样？",
    "Translate into Chinese: This car is very big and very old.",
    "List five vegetables, and say of each of them where it grows best and when it is sown.",
    "Why?",
]


def chatglm_folder(folder: Path) -> Path:
    weights = chatglm.original_weights(chatglm.CONFIG)
    chatglm.write_checkpoint(
        folder / "published", chatglm.CONFIG, weights, chatglm.sentencepiece_model()
    )
    convert_chatglm(folder / "published", folder / "glm", dtype="float32")
    return folder / "glm"


@pytest.mark.parametrize("kind", ["llama", "glm", "gpt2", "chatglm3"])
def test_batched_answers_are_those_of_one_by_one(kind, folder, tmp_path):
    if kind == "chatglm3":
        where = chatglm_folder(tmp_path)
    else:
        where = Path(tiny_model(tmp_path / kind, kind))
        AutoTokenizer.from_pretrained(
            Path(answers_module.__file__).parents[1] / "data/demo"
        ).save_pretrained(where)
    answerer = Answerer(where, dtype=torch.float32)
    assert answerer.template.name == ("chatglm3" if kind == "chatglm3" else "auto")
    prompts = [
        answerer.template.encode_prompt([answers_module.Message("user", p)]) for p in PROMPTS
    ]
    together = answerer.answer(prompts, 12)
    assert together == [answerer.answer([ids], 12)[0] for ids in prompts]
    assert len({answer.text for answer in together}) > 2
    assert answerer(PROMPTS[1], 12) == together[1].text


def test_generation_ends_at_the_templates_stop_token(model):
    answerer = Answerer(model)
    (stop, *_) = answerer.template.stop_ids
    with torch.no_grad():
        answerer.model.get_output_embeddings().weight.zero_()  # every logit 0: token 0 each time
        assert not answerer.answer([[5, 6]], 4)[0].stopped
        answerer.template.stop_ids = (0,)
        assert answerer.answer([[5, 6], [7]], 4) == [("", True), ("", True)]
    assert stop != 0


def test_a_folders_own_generation_settings_do_not_count(model, tmp_path):
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in model.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    settings = json.loads((changed / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0, "max_length": 3}
    (changed / "generation_config.json").write_text(json.dumps(settings))
    prompts = [[9, 10, 11, 12], [13, 14]]
    assert Answerer(changed).answer(prompts, 20) == Answerer(model).answer(prompts, 20)


def test_batches_hold_similar_lengths_within_the_limit():
    lengths = [30, 5, 7, 90, 6, 31, 500]
    found = batches(lengths, 10, 100)
    assert sorted(p for batch in found for p in batch) == list(range(7))
    for batch in found:
        assert len(batch) == 1 or len(batch) * (max(lengths[p] for p in batch) + 10) <= 100
    assert found == [[1, 4, 2], [0, 5], [3], [6]]


def test_an_adapter_is_evaluated_merged(run, folder, tmp_path):
    lora = train(folder, "lora", model={"path": str(folder / "model"), "lora": {"r": 4}})
    limits = ("--samples", 1, "--max-new-tokens", 4)
    of_run = evaluated(lora, tmp_path / "run", *limits)
    adapter = export(lora, folder / "adapter")
    more = ("--data", DATA, "--max-tokens", 256, *limits)
    of_adapter = evaluated(adapter, tmp_path / "adapter", *more)
    of_merged = evaluated(export(lora, folder / "merged", merge=True), tmp_path / "merged", *more)
    assert of_run["answers"] == of_adapter["answers"] == of_merged["answers"]
    last = [r for r in read_lines(lora / "metrics.jsonl") if r["event"] == "eval"][-1]
    assert of_run["loss"]["all"]["loss"] == pytest.approx(last["eval_loss"], rel=1e-4)


def test_a_runs_attention_is_kept(folder, tmp_path):
    eager = train(folder, "eager", model={"attention": "eager"})
    with open_subject(eager, tmp_path, [], {}) as subject:
        assert subject.config.model.attention == "eager"
        assert subject.config.data.train == [DATA]
    with open_subject(eager, tmp_path, [], {"attention": "sdpa", "max_tokens": 99}) as subject:
        assert subject.config.model.attention == "sdpa"
        assert subject.config.data.max_tokens == 99
    last = [r for r in read_lines(eager / "metrics.jsonl") if r["event"] == "eval"][-1]
    result = evaluated(eager, tmp_path, "--samples", 0)
    assert result["loss"]["all"]["loss"] == pytest.approx(last["eval_loss"], rel=1e-4)


def test_rows_of_ones_own(model, tmp_path):
    """`answers` of a row are references, an unknown task has ROUGE-L alone, long prompts count."""
    rows = [
        {"task": "qa", "prompt": "capital?", "completion": "It is Paris.", "answers": ["Paris"]},
        {"task": "poems", "prompt": "a poem", "completion": "a rose"},
        {"task": "qa", "prompt": "word " * 150, "completion": "yes"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluated(
        model, tmp_path / "out", "--data", data, "--max-new-tokens", 400, "--max-tokens", 500
    )
    assert result["answers"]["too_long"] == 1
    assert result["loss"]["all"]["samples"] == 3
    assert set(result["answers"]["by_task"]["poems"]["metrics"]) == {"rouge_l"}
    first = read_lines(tmp_path / "out" / "predictions.jsonl")[0]
    assert first["references"] == ["Paris", "It is Paris."]
    assert first["source"] == "rows"


def test_rows_that_never_became_samples_are_told(model, tmp_path, capsys):
    rows = [
        {"prompt": "capital?", "completion": "Paris."},
        {"prompt": "word " * 150, "completion": "yes"},
        {"prompt": "", "completion": "yes"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:2] * 10]))
    limits = ("--samples", 1, "--max-new-tokens", 4, "--max-tokens", 40)
    result = evaluated(model, tmp_path / "out", "--data", data, *limits)
    assert result["answers"]["too_long"] == 0
    assert result["data"]["dropped_no_trained_tokens"] == 11
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 rejected (rejects.jsonl), 11 without an answer within max_tokens" in shown


def test_a_runs_own_limits_on_rows(folder, tmp_path):
    deep = json.loads("[" * 80 + "]" * 80)
    row = {"prompt": "capital?", "completion": "Paris.", "x": deep}
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row) + "\n")
    run = train(folder, "deep", data={"eval": [str(data)], "max_depth": 100})
    assert evaluated(run, tmp_path, "--max-new-tokens", 2)["answers"]["predictions"] == 1


def test_losses_alone(model, tmp_path, capsys):
    result = evaluated(model, tmp_path, "--data", DATA, "--samples", 0)
    assert result["answers"]["predictions"] == 0
    assert result["loss"]["all"]["samples"] > 100


def test_judged_against_another_model(model, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    limits = ("--data", DATA, "--samples", 2, "--max-new-tokens", 6)
    evaluated(folder / "base-with-tokenizer", tmp_path / "base", *limits)
    with server(prefers(longer)) as (url, seen):
        against = ("--against", tmp_path / "base" / "predictions.jsonl", "--judge-key-env", "A_KEY")
        judge = ("--judge", url, "--judge-model", "m", *against)
        evaluated(model, tmp_path / "tuned", *limits, *judge)
        shown = capsys.readouterr()
        asked = len(seen)
        evaluated(model, tmp_path / "tuned", *limits, *judge)
        assert len(seen) == asked > 0
    found = json.loads((tmp_path / "tuned" / "judge.json").read_text())
    ours, theirs = (read_lines(tmp_path / n / "predictions.jsonl") for n in ("tuned", "base"))
    lengths = [
        (len(a["prediction"]), len(b["prediction"])) for a, b in zip(ours, theirs, strict=True)
    ]
    assert found["win"] == sum(a > b for a, b in lengths)
    assert found["loss"] == sum(a < b for a, b in lengths)
    assert found["pairs"] == 8
    assert "judged by m" in shown.out
    assert KEY not in shown.out + shown.err
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


def test_mistakes_about_the_judge(model, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("")
    judge = ["eval", model, "--data", DATA, "--judge", "http://127.0.0.1:9/v1"]
    assert "--judge-model" in fails(capsys, *judge)
    judge += ["--judge-model", "m"]
    assert "--against" in fails(capsys, *judge)
    assert "no file" in fails(capsys, *judge, "--against", tmp_path / "none.jsonl")
    judge += ["--against", tmp_path / "p.jsonl"]
    assert "NO_SUCH" in fails(capsys, *judge, "--judge-key-env", "NO_SUCH")
    judge[judge.index("http://127.0.0.1:9/v1")] = "127.0.0.1:9"
    assert "http" in fails(capsys, *judge)
    assert not (model / "eval").exists()


def test_mistakes(run, model, tmp_path, capsys):
    assert "neither a run" in fails(capsys, "eval", tmp_path / "nowhere")
    assert "--data" in fails(capsys, "eval", model)
    assert "no such file" in fails(
        capsys, "eval", model, "--data", "./none.jsonl", "--out", tmp_path
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert "no whole checkpoint" in fails(capsys, "eval", empty)
    arguments = ["eval", model, "--data", DATA, "--samples", 1, "--out", tmp_path / "out"]
    main([str(a) for a in [*arguments, "--max-new-tokens", 2]])
    before = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    assert "predictions with max_new_tokens 2, not 3: choose another --out" in fails(
        capsys, *arguments, "--max-new-tokens", 3
    )
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == before
    assert "all 4 prompts are too long" in fails(
        capsys, *arguments[:-1], tmp_path / "long", "--max-new-tokens", 512
    )
