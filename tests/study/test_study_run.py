"""A tiny study, run: cells are ordinary runs, resume, failures, equal cost, records, its report."""

import io
import itertools
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
from slap_ds.report.build import report
from slap_ds.study.comparisons import REFUSED, compare_cells
from slap_ds.study.plan import BASES, read_study
from slap_ds.study.results import collect, read_rows, write_rows
from slap_ds.study.run import read_outcome, run_study
from tests.recipes import losses, run_config, tiny_model
from tests.report.browser import CHROMIUM, browser, look

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
        {"methods": ["full", "random", "hard"], "keep": [0.5], "cost": [0.5], "seeds": [1, 2]},
        {"methods": ["full"], "keep": [1.0], "cost": [0.34], "seeds": [1, 2]},
        {"methods": ["diverges"], "keep": [0.5], "seeds": [1]},
        {"methods": ["hard"], "keep": [0.5], "seeds": [1], "variants": ["noise"]},
    ],
    "tolerance": 0.15,
    "min_gain": 0,
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
    console = Console(file=printed, width=200)
    outcome = run_study(study, root / "out", 1, console, root / "kept")
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
    kept = {path.stem for path in (folder.parent / "kept").glob("*-seed?.json")}
    assert kept == finished


def test_cell_is_an_ordinary_run(tiny, tmp_path):
    folder, *_ = tiny
    cell = folder / "cells" / "hard-keep0.5-seed2"
    config = read_config(str(cell / "config.yaml"), ["--run_dir", str(tmp_path / "run")])
    assert losses(run_config(config)) == losses(read_lines(cell / "metrics.jsonl"))


def test_every_cell_takes_the_steps_that_its_cost_buys(tiny):
    folder, study, outcome, _ = tiny
    rows = {row["cell"]: row for row in collect(folder, outcome.cells)}
    # Six steps of all candidates are the whole cost.
    assert rows["full-keep1-seed1"]["steps_taken"] == 6
    assert rows["full-keep1-cost0.5-seed1"]["steps_taken"] == 3
    assert rows["full-keep1-cost0.34-seed1"]["steps_taken"] == 2
    # Half of the candidates, unscored, in about twice the steps; scored ones in fewer.
    assert rows["random-keep0.5-cost0.5-seed1"]["steps_taken"] in (5, 6, 7)
    assert rows["hard-keep0.5-cost0.5-seed1"]["steps_taken"] in (4, 5)
    for name, row in rows.items():
        if "cost0.5" in name and "seed1" in name:
            # Of the FLOPs a step on all candidates takes on average, six times.
            whole = 6 * row["full_flops"] / row["steps_taken"]
            assert row["flops"] / whole == pytest.approx(0.5, rel=study.tolerance)
    # The learning rate ends with the run, however many steps it has.
    for name in ("full-keep1-cost0.5-seed1", "full-keep1-seed1", "hard-keep0.5-cost0.5-seed1"):
        records = read_lines(folder / "cells" / name / "metrics.jsonl")
        rates = [record["lr"] for record in records if record["event"] == "train"]
        assert (rates[0], rates[-1]) == pytest.approx((1e-3, 1e-4))
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
    assert row["eval_loss_before"] == metrics[0]["eval_loss"]
    assert row["flops"] == pytest.approx(sum(r["flops"] for r in metrics[1:-1]))
    assert str(folder) not in (tmp_path / "results.csv").read_text()

    compared = compare_cells(study, folder, rows)
    found = {
        (c["method"], c["cost"], c["against"], c["basis"]): c
        for c in compared
        if c["on"] == "all" and c["variant"] == "plain"
    }
    interpolated = {
        ("random", 0.5, "full", "samples"),
        ("random", 0.5, "full", "response_tokens"),
        ("random", None, "full", "samples"),
        ("random", None, "full", "response_tokens"),
        ("random", 0.5, "full", "seconds"),
        ("random", None, "full", "seconds"),
        ("hard", None, "full", "samples"),
    }
    measured = {
        (method, cost, against, "cost" if cost else "candidates")
        for method, cost in itertools.product(("random", "hard"), (None, 0.5))
        for against in ("full", "random")
        if against != method
    } | {("random", 0.5, "full", "all"), ("hard", 0.5, "full", "all")}
    assert measured <= set(found)
    assert {key for key in found if key not in measured} >= {("hard", None, "full", "samples")}
    assert interpolated & set(found)

    def mean(name):
        return np.mean([by_name[f"{name}-seed{seed}"]["eval_loss"] for seed in (1, 2)])

    for key, ours, theirs in (
        (("hard", 0.5, "full", "cost"), "hard-keep0.5-cost0.5", "full-keep1-cost0.5"),
        (("hard", 0.5, "full", "all"), "hard-keep0.5-cost0.5", "full-keep1"),
        (("hard", 0.5, "random", "cost"), "hard-keep0.5-cost0.5", "random-keep0.5-cost0.5"),
        (("hard", None, "full", "candidates"), "hard-keep0.5", "full-keep1"),
        # Half of the samples: where the reference was run at half of its steps.
        (("hard", None, "full", "samples"), "hard-keep0.5", "full-keep1-cost0.5"),
    ):
        row = found[key]
        assert row["difference"] == pytest.approx(mean(ours) - mean(theirs), abs=1e-4)
        assert row["low"] <= row["difference"] <= row["high"]
    assert found["hard", None, "full", "samples"]["samples_ratio"] == pytest.approx(1)
    full = [by_name[f"full-keep1-seed{seed}"] for seed in (1, 2)]
    gain = np.mean([row["eval_loss_before"] - row["eval_loss"] for row in full])
    assert found["hard", 0.5, "full", "cost"]["gain"] == pytest.approx(gain)
    assert {c["on"] for c in compared} == {
        "all", "sources", "dialogue", "general", "qa", "translation"
    }  # fmt: skip
    sources = next(c for c in compared if c["on"] == "sources" and c["basis"] == "all")
    cells = [by_name[f"{sources['method']}-keep0.5-cost0.5-seed{seed}"] for seed in (1, 2)]
    named = [key for key in cells[0] if key.startswith("eval_loss.source.")]
    assert sources["loss"] == pytest.approx(
        np.mean([cell[key] for cell in cells for key in named]), abs=1e-4
    )


def test_verdicts_are_refused_where_all_data_gain_little(tiny):
    folder, study, outcome, _ = tiny
    rows = collect(folder, outcome.cells)
    gains = [
        r["eval_loss_before"] - r["eval_loss"] for r in rows if r["cell"][:11] == "full-keep1-"
    ]
    enough = study.model_copy(update={"min_gain": 0.5 * min(gains) / study.margin})
    more = study.model_copy(update={"min_gain": 2 * max(gains) / study.margin})
    on_all = [c for c in compare_cells(enough, folder, rows) if c["on"] == "all"]
    assert REFUSED not in {c["verdict"] for c in on_all if c["variant"] == "plain"}
    on_all = [c for c in compare_cells(more, folder, rows) if c["on"] == "all"]
    assert {c["verdict"] for c in on_all if c["variant"] == "plain"} == {REFUSED}


def test_a_study_goes_on_elsewhere_from_its_records_alone(tiny, tmp_path):
    folder, study, first, _ = tiny
    printed = io.StringIO()
    kept = shutil.copytree(folder.parent / "kept", tmp_path / "kept")
    (kept / "random-keep0.5-seed2.json").unlink()
    console = Console(file=printed, width=200)
    second = run_study(study, tmp_path / "out", 1, console, kept)
    assert second == first
    made = {path.parent.name for path in (tmp_path / "out").glob("cells/*/done.json")}
    assert made == {"random-keep0.5-seed2"}  # the failed one fails again
    rows = [collect(place, first.cells) for place in (folder, tmp_path / "out")]
    drop = {"wall_s", "cpu_s", "step_s", "score_s", "selection_s"}
    for one, other in zip(*rows, strict=True):
        assert {k for k in one | other if one.get(k) != other.get(k)} <= drop


def test_finished_cells_are_not_run_again(tiny):
    folder, study, first, _ = tiny
    again = folder / "cells" / "random-keep0.5-seed1"
    kept = folder / "cells" / "full-keep1-seed1" / "done.json"
    before = kept.stat().st_mtime_ns
    changed = read_lines(again / "metrics.jsonl")
    (folder / "results" / f"{again.name}.json").unlink()  # as if it had been interrupted
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
    (out / "results" / "full-keep1-seed2.json").rename(tmp_path / "aside")
    assert run()[1] != scored
    # As if that start had been interrupted before the second cell was made again.
    (tmp_path / "aside").rename(out / "results" / "full-keep1-seed2.json")
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
    expected = "cost-plain quality-plain differences-full differences-random flops seconds losses "
    expected += "coverage-plain coverage-noise"
    assert {f"{name}.png" for name in expected.split()} <= names
    assert len(re.findall("<img ", text)) == len(names)
    assert_self_contained(text)
    assert "diverges-keep0.5-seed1 failed" in text
    assert "demo_qa (noise)" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (CONTRIBUTING.md)")
def test_a_browser_finds_nothing_that_overflows_in_it(tiny, tmp_path):
    with browser() as tab:
        look(tab, report([tiny[0]], tmp_path))
        assert tab.complaints == []


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
    raw = {**STUDY, "base": {"path": tiny_model(tmp_path / "model")}}
    raw |= {"overrides": {"steps": 100_000}, "grid": STUDY["grid"][:1]}
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
    rows = read_rows(out / "cells.parquet")
    assert len(rows) >= 30 + 9
    assert all(row["eval_loss"] < row["eval_loss_before"] for row in rows)
    compared = read_rows(out / "comparisons.parquet")
    assert {row["basis"] for row in compared} == set(BASES)
    main(["report", str(out)])
    assert_self_contained((out / "report" / "index.html").read_text())
