"""Runs side by side: what may be compared, and many of them in a narrow terminal."""

import json

from slap_ds.cli import main
from slap_ds.config.file import write_config
from slap_ds.models.load import DEMO_TOKENIZER
from tests.recipes import tiny_config

TOTALS = ("picked", "trained_tokens", "flops", "step_s", "score_s", "selection_s")


def test_losses_of_different_tokens_have_no_ratio(tmp_path, capsys):
    """Runs that differ in what they were evaluated on, and by which tokenizer; or only in names."""
    records = [
        {"event": "eval", "eval_loss": 4.0, "eval_loss_by_task": {"qa": 4.0}},
        {"event": "train", "loss": 3.0, "total": dict.fromkeys(TOTALS, 8)},
        {"event": "eval", "eval_loss": 2.0, "eval_loss_by_task": {"qa": 2.0}},
    ]
    copy = tmp_path / "copy.json"
    copy.write_bytes((DEMO_TOKENIZER / "tokenizer.json").read_bytes())
    changes = {
        "a": {"model": {"tokenizer": str(DEMO_TOKENIZER)}},
        "b": {"model": {"tokenizer": str(copy)}},
        "c": {"data": {"max_tokens": 128}, "model": {"tokenizer": str(copy)}},
        "d": {"data": {"eval": ["other.jsonl"]}, "model": {"tokenizer": "other/tokenizer"}},
    }
    for name, change in changes.items():
        run = tmp_path / name
        run.mkdir()
        write_config(tiny_config("model", tmp_path / "run", **change), run / "config.yaml")
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    def compared(*names):
        capsys.readouterr()
        main(["compare", *(str(tmp_path / name) for name in names)])
        text = capsys.readouterr().out
        return text.count("1.000"), text

    ratios, text = compared("a", "b")
    assert "different tokens" not in text
    costs, text = compared("a", "c")
    assert ratios == costs + 4  # training, before, after, qa
    assert text.endswith("would say nothing: data.max_tokens is 256 in a, 128 in c\n")
    costs, text = compared("a", "c", "d")
    assert ratios == costs + 4
    assert "data.eval is ['builtin:demo/eval'] in a, ['other.jsonl'] in d; model.tok" in text
    assert f"model.tokenizer is {DEMO_TOKENIZER} in a, other/tokenizer in d\n" in text
    assert compared("a", "c", "b")[0] == ratios


def test_many_runs_with_long_names_fit_eighty_columns(tmp_path, capsys):
    """Every line fits, no number is broken, and each run keeps its name and losses."""
    runs = []
    for seed in range(12):
        run = tmp_path / f"seed{seed}" / "llama3-8b-instruct-slap-keep0.6-lr2e-5-wide-mixture"
        run.mkdir(parents=True)
        loss = 1 + seed / 100
        records = [
            {"event": "train", "loss": 3.0, "total": dict.fromkeys(TOTALS, 123_456_789_012.0)},
            {"event": "eval", "eval_loss": loss, "eval_loss_by_task": {"a" * 40: loss, "qa": 9.5}},
        ]
        write_config(tiny_config("model", tmp_path / "run"), run / "config.yaml")
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        runs.append(str(run))
    capsys.readouterr()
    main(["compare", *runs])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for seed in range(12):
        assert text.count(f"{1 + seed / 100:.4f}") == 2  # overall, and of a task
        assert f" {seed + 1}  seed{seed}/llama" in text
    assert text.count("123 B") == 24
    assert "123 GFLOPs" not in text


# Of 659 training samples, 16 at a step.
