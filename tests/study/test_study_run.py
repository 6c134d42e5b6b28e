"""A tiny study, run: cells are ordinary runs, resume, failures, matched references, its report."""

import io
import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from rich.console import Console

from slap_ds.cli import main
from slap_ds.config.file import read_config
from slap_ds.jsonl import read_lines
from slap_ds.study.comparisons import compare_cells
from slap_ds.study.plan import read_study
from slap_ds.study.results import collect, read_rows, write_rows
from slap_ds.study.run import read_outcome, run_study
from tests.recipes import losses, run_config, tiny_model

FINETUNE = {
    "run_dir": "x",
    "steps": 6,
    "model": {"path": "x", "tokenizer": "builtin:demo"},
    "data": {"train": ["x"], "max_tokens": 128},
    "batch": {"candidates": 12, "micro_batch_tokens": 256},
    "optimizer": {"lr": 1e-3},
    "engine": {"kind": "torch"},
}
STUDY = {
    "name": "tiny",
    "data": {
        "train": ["builtin:demo/train"],
        "eval": ["builtin:demo/eval"],
        "per_source": 24,
        "base_share": 0.25,
        "eval_per_source": 4,
    },
    "config": "finetune.yaml",
    "methods": {
        "full": {"selection.method": "full"},
        "random": {"selection.method": "random"},
        "hard": {"selection.method": "hard"},
        "diverges": {"selection.method": "hard", "optimizer.lr": 1e30},
    },
    "variants": {"noise": {"noise": {"source": "demo_qa", "share": 0.5}}},
    "grid": [
        {"methods": ["full", "random", "hard"], "keep": [0.5], "seeds": [1, 2]},
        {"methods": ["diverges"], "keep": [0.5], "seeds": [1]},
        {"methods": ["hard"], "keep": [0.5], "seeds": [1], "variants": ["noise"]},
    ],
    "matched": ["samples", "seconds"],
    "matched_methods": ["hard"],
    "seconds_ratio": {"hard": 0.75},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, study, outcome, what was printed)."""
    root = tmp_path_factory.mktemp("study")
    raw = {**STUDY, "base": {"path": tiny_model(root / "model")}}
    (root / "study.yaml").write_text(yaml.safe_dump(raw))
    (root / "finetune.yaml").write_text(yaml.safe_dump(FINETUNE))
    study = read_study(str(root / "study.yaml"), None)
    printed = io.StringIO()
    outcome = run_study(study, root / "out", 1, Console(file=printed, width=200))
    return root / "out", study, outcome, printed.getvalue()


def test_failed_cell_is_recorded_and_stops_no_other(tiny):
    folder, _, outcome, printed = tiny
    assert outcome.failed == ["diverges-keep0.5-seed1"]
    error = (folder / "cells" / outcome.failed[0] / "error.txt").read_text()
    assert "candidates have NaN or infinite scores" in error.splitlines()[0]
    assert "FAILED" in printed
    finished = {path.parent.name for path in folder.glob("cells/*/done.json")}
    assert finished == {cell.name for cell in outcome.cells} - set(outcome.failed)
    assert not list(folder.glob("cells/*/checkpoints/*"))


def test_cell_is_an_ordinary_run(tiny, tmp_path):
    folder, *_ = tiny
    cell = folder / "cells" / "hard-keep0.5-seed2"
    config = read_config(str(cell / "config.yaml"), ["--run_dir", str(tmp_path / "run")])
    assert losses(run_config(config)) == losses(read_lines(cell / "metrics.jsonl"))


def test_matched_references_have_the_steps_that_cost_as_much(tiny):
    folder, _, outcome, _ = tiny
    steps = {(m.variant, m.basis): m.steps for m in outcome.matched}
    # Six steps of half the candidates are three of all; 0.75 * 6 rounds to 4.
    assert steps == {("plain", "samples"): 3, ("plain", "seconds"): 4}
    names = {cell.name for cell in outcome.cells if cell.steps is not None}
    assert names == {f"full-keep1-steps{n}-seed{s}" for n in (3, 4) for s in (1, 2)}
    rows = {row["cell"]: row for row in collect(folder, outcome.cells)}
    assert rows["full-keep1-steps3-seed1"]["samples"] == rows["hard-keep0.5-seed1"]["samples"] == 36
    assert read_outcome(folder)[1] == outcome


def test_results_and_comparisons(tiny, tmp_path):
    folder, study, outcome, _ = tiny
    rows = collect(folder, outcome.cells)
    write_rows(rows, tmp_path / "results")
    assert read_rows(tmp_path / "results.parquet") == rows
    by_name = {row["cell"]: row for row in rows}
    row = by_name["hard-keep0.5-seed1"]
    assert (row["candidates"], row["samples"], row["steps_taken"]) == (72, 36, 6)
    assert json.loads(row["config.selection.method"]) == "hard"
    metrics = read_lines(folder / "cells" / row["cell"] / "metrics.jsonl")
    assert row["eval_loss"] == metrics[-1]["eval_loss"]
    assert row["flops"] == pytest.approx(sum(r["flops"] for r in metrics[1:-1]))
    assert str(folder) not in (tmp_path / "results.csv").read_text()

    compared = compare_cells(study, folder, rows, outcome.matched)
    found = {
        (c["variant"], c["method"], c["against"], c["basis"]): c
        for c in compared
        if c["on"] == "all"
    }
    assert set(found) == {
        ("plain", "random", "full", "candidates"),
        ("plain", "hard", "full", "candidates"),
        ("plain", "hard", "full", "samples"),
        ("plain", "hard", "full", "seconds"),
        ("plain", "hard", "random", "candidates"),
    }
    ours, theirs = (
        [by_name[f"{name}-seed{seed}"]["eval_loss"] for seed in (1, 2)]
        for name in ("hard-keep0.5", "full-keep1-steps3")
    )
    equal = found["plain", "hard", "full", "samples"]
    assert equal["difference"] == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert equal["samples_ratio"] == 1
    assert equal["low"] < equal["difference"] < equal["high"]
    assert {c["on"] for c in compared} == {"all", "dialogue", "general", "qa", "translation"}


def test_finished_cells_are_not_run_again(tiny):
    folder, study, first, _ = tiny
    again = folder / "cells" / "random-keep0.5-seed1"
    kept = folder / "cells" / "full-keep1-seed1" / "done.json"
    before = kept.stat().st_mtime_ns
    changed = read_lines(again / "metrics.jsonl")
    (again / "done.json").unlink()  # as if it had been interrupted
    (again / "metrics.jsonl").write_text("half a li")
    printed = io.StringIO()
    second = run_study(study, folder, 1, Console(file=printed, width=200))
    assert second == first
    assert "[1/2]" in printed.getvalue()  # the interrupted one, and the failed one
    assert kept.stat().st_mtime_ns == before
    assert losses(read_lines(again / "metrics.jsonl")) == losses(changed)


@pytest.mark.slow
def test_what_was_made_of_other_things_is_not_finished(tmp_path, caplog):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} + 1 =", "completion": str(n + 1)} for n in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "name": "own",
        "base": {"path": tiny_model(tmp_path / "model"), "losses": True},
        "config": "finetune.yaml",
        "methods": {"full": {"selection.method": "full"}},
        "grid": [{"methods": ["full"], "keep": [1.0], "seeds": [1, 2]}],
    }
    files = {"train": [str(data)], "eval": ["builtin:demo/eval"], "max_tokens": 128}
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump({**FINETUNE, "steps": 1, "data": files}))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw))
    study, out = read_study(str(tmp_path / "study.yaml"), None), tmp_path / "out"

    def run():
        printed = io.StringIO()
        run_study(study, out, 1, Console(file=printed, width=200))
        losses = (out / "base" / "losses.json").read_text()
        return int(re.search(r"\[\d/(\d)\]|$", printed.getvalue())[1] or 0), losses

    cells, scored = run()
    assert cells == 2
    assert run() == (0, scored)
    tiny_model(tmp_path / "model", initializer_range=0.2)
    cells, again = run()
    assert cells == 2
    assert again != scored
    data.write_text(data.read_text().replace("1", "one"))
    assert run()[0] == 2
    changed = study.model_copy(update={"overrides": {"data.max_tokens": 64}})
    study, scored = changed, again
    (out / "cells" / "full-keep1-seed2").rename(tmp_path / "aside")
    assert run()[1] != scored
    # As if that start had been interrupted before the second cell was made again.
    shutil.rmtree(out / "cells" / "full-keep1-seed2")
    (tmp_path / "aside").rename(out / "cells" / "full-keep1-seed2")
    rows = collect(out, read_outcome(out)[1].cells)
    assert [row["cell"] for row in rows] == ["full-keep1-seed1"]
    assert "left out 1 cells" in caplog.text
    assert "full-keep1-seed2" in caplog.text


def test_report_of_a_study(tiny, capsys):
    folder, *_ = tiny
    main(["report", str(folder)])
    page = folder / "report" / "index.html"
    assert str(page) in capsys.readouterr().out
    text = page.read_text()
    names = {path.name for path in page.parent.glob("*.png")}
    expected = "quality-plain differences-full differences-random flops seconds losses "
    expected += "coverage-plain coverage-noise"
    assert {f"{name}.png" for name in expected.split()} <= names
    assert len(re.findall("<img ", text)) == len(names)
    assert_self_contained(text)
    assert "diverges-keep0.5-seed1 failed" in text
    assert "demo_qa (noise)" in text


def assert_self_contained(text):
    assert not re.search(r"https?://|<link|<script|@import|url\(", text)
    assert set(re.findall(r'src="([^,]*),', text)) == {"data:image/png;base64"}


def test_mistakes_are_one_line(tiny, tmp_path, capsys):
    folder, study, *_ = tiny
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "neither a run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--jobs is 0"):
        run_study(study, folder, 0, Console(file=io.StringIO()))
    wrong = study.model_copy(update={"overrides": {"batch.candidate": 3}})
    with pytest.raises(ValueError, match="did you mean 'candidates'") as caught:
        run_study(wrong, folder, 1, Console(file=io.StringIO()))
    assert str(caught.value).count("batch.candidate:") == 1  # once, not for every cell


@pytest.mark.slow
def test_a_terminated_study_takes_its_workers_along(tmp_path):
    raw = {**STUDY, "base": {"path": tiny_model(tmp_path / "model")}, "matched": []}
    raw |= {"overrides": {"steps": 100_000}, "matched_methods": [], "seconds_ratio": {}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(FINETUNE))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "slap_ds", "study", str(tmp_path / "study.yaml")]
    with (tmp_path / "log").open("wb") as log:
        process = psutil.Popen([*command, "--out", str(out)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while not any(p.stat().st_size for p in out.glob("cells/*/metrics.jsonl")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        workers = process.children(recursive=True)
        assert len(workers) >= 2  # the fork server and the one that trains
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
        _, left = psutil.wait_procs(workers, timeout=10)
        assert not left
    finally:
        for each in [*process.children(recursive=True), process] if process.is_running() else []:
            each.kill()


@pytest.mark.slow
def test_quick_study_from_end_to_end(tmp_path):
    quick = Path(__file__).parents[2] / "configs" / "study" / "quick.yaml"
    out = tmp_path / "quick"
    main(["study", str(quick), "--out", str(out), "--jobs", "2"])
    rows = read_rows(out / "results.parquet")
    assert len(rows) >= 30 + 9
    assert all(row["eval_loss"] < row["eval_loss_before"] for row in rows)
    compared = read_rows(out / "comparisons.parquet")
    assert {row["basis"] for row in compared} == {"candidates", "samples", "flops", "seconds"}
    main(["report", str(out)])
    assert_self_contained((out / "report" / "index.html").read_text())
