"""Reports: coverage against a plain count, the starvation warning, histograms from deciles."""

import json

import numpy as np
import pytest
import torch

from slap_ds.data.formats import read_conversations
from slap_ds.jsonl import read_lines
from slap_ds.report.build import report
from slap_ds.report.coverage import Slice, cover, label_samples, merged, script_of, starved
from slap_ds.report.figures import spread
from slap_ds.report.names import names_of
from slap_ds.report.numbers import duration_text, flops_text, interval_text, plain
from slap_ds.train.inputs import read_inputs
from slap_ds.train.record import loss_spread
from tests.recipes import run_config, tiny_config, tiny_model

pytestmark = pytest.mark.lane


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run with 240 candidates, its inputs)."""
    root = tmp_path_factory.mktemp("report")
    config = tiny_config(
        tiny_model(root / "model"),
        root / "run",
        engine={"kind": "torch"},
        steps=10,
        batch={"candidates": 24},
        selection={"method": "random", "keep": 0.5},
        checkpoint={"last": False},
    )
    run_config(config)
    return root / "run", read_inputs(config)


def test_coverage_is_what_a_plain_count_says(run):
    folder, inputs = run
    found = cover(folder, label_samples(inputs))
    assert found.drawn.sum() == 240
    assert found.kept.sum() == 120
    assert (found.kept <= found.drawn).all()
    picked = [i for r in read_lines(folder / "picks.jsonl") for i in r["ids"]]
    place = {int(sample): i for i, sample in enumerate(inputs.train.sample_ids)}
    rows = list(read_conversations(["builtin:demo/train"]))
    for kind, value in (("task", "task"), ("language", "lang"), ("source", "source")):
        for name in {getattr(row, value) for row in rows}:
            kept = sum(getattr(rows[place[i]], value) == name for i in picked)
            (each,) = [s for s in found.slices if (s.kind, s.name) == (kind, name)]
            assert each.kept == kept
    for kind in ("script", "length"):
        assert sum(s.drawn for s in found.slices if s.kind == kind) == 240
    assert max(s.drawn for s in found.slices if s.kind == "length") < 60


def test_script_slices_agree_with_the_rows(run):
    _, inputs = run
    names, codes = label_samples(inputs).kinds["script"]
    rows = list(read_conversations(["builtin:demo/train"]))
    for row, code in zip(rows, codes, strict=True):
        answers = "".join(m.content for m in row.messages if m.role == "assistant")
        if row.lang in ("en", "zh"):
            words = any(letter.isalpha() for letter in answers)
            expected = {"en": "Latin", "zh": "CJK"}[row.lang] if words else "other"
            assert names[code] == expected
    assert script_of("Где вокзал? OK") == "Cyrillic"
    assert script_of("12 + 3 = 15") == "other"


def test_warning_for_a_planted_starved_slice_and_not_otherwise(run, tmp_path):
    folder, inputs = run
    text = report([folder], tmp_path / "fair").read_text()
    assert "starved:" not in text
    assert 'class="warning"' not in text
    # The same candidates, but of the source demo_qa hardly any is picked.
    code = inputs.train.names["source"].index("demo_qa")
    source = dict(zip(inputs.train.sample_ids.tolist(), inputs.train.source.tolist(), strict=True))
    planted = tmp_path / "planted"
    planted.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (planted / name).write_bytes((folder / name).read_bytes())
    lines = read_lines(folder / "picks.jsonl")
    for line in lines[1:]:
        line["ids"] = [i for i in line["ids"] if source[i] != code]
    (planted / "picks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report([planted])
    assert page == planted / "report" / "index.html"
    assert "source &#x27;demo_qa&#x27; is starved" in page.read_text()


def test_picks_of_other_data_are_told_and_the_rest_is_shown(run, tmp_path):
    folder, inputs = run
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "picks.jsonl").write_text('{"step": 0, "ids": [5], "weights": [1.0]}\n')
    with pytest.raises(ValueError, match="have changed since"):
        cover(tmp_path, label_samples(inputs))
    text = report([tmp_path]).read_text()
    assert "data can no longer be read" in text
    assert "have changed since" in text
    assert "<h2>Evaluation</h2>" in text


def test_numbers_for_people():
    seconds = (0.04, 8.42, 59.7, 725, 11520, 3 * 86400 + 4 * 3600)
    said = ["0.04 s", "8.42 s", "1 min 0 s", "12 min 5 s", "3 h 12 min", "3 d 4 h"]
    assert [duration_text(s) for s in seconds] == said
    assert [flops_text(n) for n in (3.75e10, 2.1e21)] == ["37.5 GFLOPs", "2100 EFLOPs"]
    values = (None, float("nan"), 1234567, 0.5, -1.5, 1.0e-5, 2_500_000.0, "x")
    assert [plain(v) for v in values] == [
        "", "", "1,234,567", "0.5000", "−1.5000", "1.00e-05", "2.50 M", "x",
    ]  # fmt: skip
    assert interval_text(-0.05, -0.07, float("inf")) == "−0.0500 [−0.0700, ∞]"


def test_names_tell_folders_apart(tmp_path):
    folders = [tmp_path / name for name in ("a/seed1", "b/seed1", "c/seed2", "c/seed2")]
    assert names_of(folders) == ["a/seed1", "b/seed1", "seed2", "seed2"]


def test_rule_of_starvation():
    fair, few, rare = Slice("a", "fair", 100, 55), Slice("a", "few", 20, 0), Slice("a", "r", 40, 9)
    assert starved([fair, few, rare], 0.6) == [rare]  # 22 % of 40; 20 draws are too few
    assert starved([Slice("a", "unlucky", 30, 2)], 0.2) == []  # P(2 or fewer of 30) is 4 %
    assert merged([[fair], [Slice("a", "fair", 10, 1), few]]) == [
        Slice("a", "fair", 110, 56),
        few,
    ]


def test_loss_spread_against_sorting():
    loss = torch.tensor([float(i) for i in range(20)] + [float("nan")])
    found = loss_spread(loss, torch.tensor([0, 1, 2, 18, 19]))
    assert found["candidate_loss_deciles"] == pytest.approx([1.9 * i for i in range(11)])
    assert found["picked_loss_deciles"][0] == 0
    assert found["picked_loss_deciles"][5] == 2
    assert found["kept_by_loss_decile"] == [1, 0.5, 0, 0, 0, 0, 0, 0, 0, 1]
    assert loss_spread(torch.tensor([float("nan")]), torch.tensor([0])) == {}


def test_histograms_from_deciles_keep_the_mass():
    generator = np.random.default_rng(0)
    values = generator.normal(3, 1, 20_000)
    edges = np.linspace(-2, 8, 41)
    deciles = np.quantile(values, np.linspace(0, 1, 11))
    density = spread([deciles, deciles], edges)
    assert (density * np.diff(edges)).sum() == pytest.approx(1, abs=1e-6)
    exact, _ = np.histogram(values, edges, density=True)
    middle = slice(15, 25)  # between the first and the ninth decile
    assert np.abs(density[middle] - exact[middle]).max() < 0.08
