"""The tables of docs/experiments.md: what a study compared, written between its markers."""

import csv
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "study_tables.py"
ROW = {
    "variant": "plain", "method": "default", "keep": 0.6, "strata": "", "cost": 0.7,
    "against": "full", "basis": "cost", "on": "all", "seeds": 5, "steps": 150, "loss": 4.5,
    "loss_against": 4.6, "gain": 2.5, "difference": -0.1, "low": -0.12, "high": -0.08,
    "verdict": "better", "flops_ratio": 1.0, "share": 0.91, "share_low": 0.85, "share_high": "inf",
}  # fmt: skip


def written(tmp_path, name, rows):
    """What the script makes of a page whose places are empty, called as its docstring says."""
    folder = tmp_path / "results" / name
    folder.mkdir(parents=True)
    with (folder / "comparisons.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROW)
        writer.writeheader()
        writer.writerows([{**ROW, **row} for row in rows])
    page = tmp_path / "page.md"
    places = "".join(
        f"<!-- regime: {each} -->\nold\n<!-- /regime -->\n" for each in (name, "other")
    )
    page.write_text(f"a\n<!-- regime: overview -->\n<!-- /regime -->\n{places}z\n")
    before = sys.argv
    sys.argv = [str(SCRIPT), str(tmp_path / "results"), "--into", str(page)]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = before
    return page.read_text()


def test_tables_hold_what_was_compared(tmp_path):
    rows = [
        {},
        {"against": "random", "difference": 0.02, "low": 0.01, "high": 0.03, "verdict": "worse"},
        {"basis": "all", "difference": 0.05, "low": 0.04, "high": 0.06, "verdict": "worse"},
        {"basis": "samples", "flops_ratio": 1.25, "difference": -0.3, "low": -0.4, "high": -0.2},
        {"on": "qa", "share": 0.5, "share_low": 0.4, "share_high": 0.6},
        {"method": "hard", "loss": 4.4, "seeds": 3},
    ]
    text = written(tmp_path, "noise", rows)
    assert text.startswith("a\n")
    assert text.endswith("<!-- regime: other -->\nold\n<!-- /regime -->\nz\n")
    overview = text[: text.index("<!-- regime: noise")]
    better, worse = "-0.100 [-0.120, -0.080] better", "+0.020 [+0.010, +0.030] worse"
    assert f"| [noise](#noise) | 2.50 | {better} | {worse} | 0.91 [0.85, ∞] |" in overview
    lines = text.splitlines()
    best = next(i for i, line in enumerate(lines) if line.startswith("| hard 40%"))
    default = next(i for i, line in enumerate(lines) if line.startswith("| default 40%"))
    assert best < default  # the lowest loss first
    assert worse in lines[default]
    assert "+0.050 [+0.040, +0.060] worse" in lines[default]
    assert "| qa | 2.500 | 4.500 |" in text
    assert "| default | samples | 1.25 | -0.300" in text
    assert "is better against all data, worse against random, at equal cost" in text


def test_no_verdict_is_said_first(tmp_path):
    text = written(tmp_path, "noise", [{"verdict": "no verdict", "gain": 0.031}])
    assert "**No verdict**: all data gain 0.031 over the base" in text


def test_the_dominated_mixture_is_told_by_the_mean_over_sources(tmp_path):
    rows = [{"loss": 1.0}, {"on": "sources", "loss": 2.0, "difference": 0.5}]
    text = written(tmp_path, "dominated", rows)
    overview = text[: text.index("<!-- regime: dominated")]
    assert "+0.500" in overview
    assert "-0.100" not in overview


def test_the_page_has_a_place_for_every_regime():
    text = (ROOT / "docs" / "experiments.md").read_text()
    regimes = ("overview", "new-domain", "epochs", "redundancy", "noise", "dominated", "smollm2")
    for name in regimes:
        assert text.count(f"<!-- regime: {name} -->") == 1


@pytest.mark.parametrize("share", ["", "nan"])
def test_what_is_not_known_is_left_open(tmp_path, share):
    rows = [{"share": share, "low": "", "high": "", "seeds": 1}]
    text = written(tmp_path, "noise", rows)
    assert "-0.100 (one seed)" in text
