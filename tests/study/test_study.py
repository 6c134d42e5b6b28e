"""Studies in parts: the plan, the rows, the workers."""

import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
import yaml

from slap_ds.data.formats import Conversation, Message
from slap_ds.study import keys
from slap_ds.study.data import changed, split, write_data
from slap_ds.study.keys import Keys
from slap_ds.study.plan import Cell, Variant, all_configs, base_config, plan, read_study
from slap_ds.study.pool import Failure, run_tasks
from tests.recipes import tiny_config

STUDIES = Path(__file__).parents[2] / "configs" / "study"
METHODS = {
    "full": {"selection.method": "full"},
    "random": {"selection.method": "random"},
    "slap": {"selection.method": "slap"},
}


def study_file(tmp_path, **changes):
    raw = {
        "name": "tiny",
        "base": {"path": "a/model"},
        "config": "finetune.yaml",
        "methods": METHODS,
        "grid": [{"methods": ["full", "slap"], "keep": [0.4, 0.6], "seeds": [1, 2]}],
        **changes,
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def test_grid_becomes_cells_each_once_seed_by_seed(tmp_path):
    grid = [
        {"methods": ["full", "slap"], "keep": [0.4, 0.6], "seeds": [1, 2]},
        {"methods": ["slap"], "keep": [0.6], "seeds": [1, 2], "strata": [2, 8]},
        {"methods": ["slap", "random"], "keep": [0.6], "seeds": [1]},
    ]
    cells = plan(read_study(study_file(tmp_path, grid=grid), None))
    # The reference keeps all, so its two keep ratios are one cell; slap at 0.6 stands twice.
    assert [cell.name for cell in cells] == [
        "full-keep1-seed1",
        "slap-keep0.4-seed1",
        "slap-keep0.6-seed1",
        "slap-keep0.6-k2-seed1",
        "slap-keep0.6-k8-seed1",
        "random-keep0.6-seed1",
        "full-keep1-seed2",
        "slap-keep0.4-seed2",
        "slap-keep0.6-seed2",
        "slap-keep0.6-k2-seed2",
        "slap-keep0.6-k8-seed2",
    ]
    assert Cell("full", 1.0, None, "noisy", 3, 40).name == "full-keep1-noisy-steps40-seed3"


def test_all_mistakes_of_a_study_at_once(tmp_path):
    path = study_file(
        tmp_path,
        grid=[{"methods": ["slap"], "keep": [0.6], "seed": [1]}],
        margn=0.1,
        base={},
    )
    with pytest.raises(ValueError, match="4 mistakes") as caught:
        read_study(path, None)
    for part in (
        "grid.0.seed: unknown key; did you mean 'seeds'?",
        "grid.0.seeds: missing",
        "margn: unknown key; did you mean 'margin'?",
        "exactly one of path and config",
    ):
        assert part in str(caught.value)
    path = study_file(
        tmp_path,
        grid=[{"methods": ["slop"], "keep": [1.5], "seeds": [1], "variants": ["noise"]}],
        reference="slap",
        matched_methods=["other"],
    )
    with pytest.raises(ValueError, match="1 mistake") as caught:
        read_study(path, None)
    for part in (
        "grid.0.methods: 'slop'",
        "grid.0.keep: 1.5",
        "grid.0.variants: 'noise'",
        "matched_methods: 'other'",
        "the reference trains all candidates",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["quick", "cpu"])
def test_committed_studies_are_valid(name, tmp_path):
    study = read_study(str(STUDIES / f"{name}.yaml"), str(tmp_path))
    cells = plan(study)
    configs = all_configs(study, cells, tmp_path)
    assert len({config.run_dir for config in configs.values()}) == len(cells) >= 30
    assert not any(config.checkpoint.last for config in configs.values())
    base = base_config(study, tmp_path)
    assert base is not None
    assert base.checkpoint.last


def test_data_folder_fills_its_place_or_is_asked_for(tmp_path):
    data = {"train": ["{data}/*.jsonl"], "eval": ["{data}/e.jsonl"]}
    path = study_file(tmp_path, data=data)
    with pytest.raises(ValueError, match="SLAP_DATA_DIR"):
        read_study(path, None)
    with pytest.raises(FileNotFoundError, match="no data folder"):
        read_study(path, str(tmp_path / "nowhere"))
    study = read_study(path, str(tmp_path))
    assert study.data is not None
    assert study.data.train == [f"{tmp_path}/*.jsonl"]


def rows(source, count):
    return [
        Conversation(
            (Message("user", f"{source} q{i}"), Message("assistant", f"{source} a{i}")),
            "task",
            source,
        )
        for i in range(count)
    ]


def test_split_is_disjoint_limited_and_independent_of_other_sources():
    a, b = rows("a", 30), rows("b", 7)
    base, rest = split(a + b, 20, 0.5, seed=4)
    assert Counter(row.source for row in base) == {"a": 10, "b": 4}
    assert Counter(row.source for row in rest) == {"a": 10, "b": 3}
    chosen = [row.messages for row in base + rest]
    assert len(set(chosen)) == 27
    alone, _ = split(a, 20, 0.5, seed=4)
    assert alone == [row for row in base if row.source == "a"]
    assert split(a, 20, 0.5, seed=5)[0] != alone
    assert split(a, None, 0.0, seed=4)[0] == []


def test_noise_shuffles_answers_of_one_source_and_marks_them():
    before = rows("a", 20) + rows("b", 5)
    after = changed(before, Variant(noise={"source": "a", "share": 0.3}), seed=0)
    noisy = [i for i, row in enumerate(after) if row.source == "a (noise)"]
    assert len(noisy) == 6
    assert all(after[i] == before[i] for i in range(25) if i not in noisy)
    for i in noisy:
        assert after[i].messages[0] == before[i].messages[0]
        assert after[i].messages[1] != before[i].messages[1]
    assert Counter(after[i].messages[1] for i in noisy) == Counter(
        before[i].messages[1] for i in noisy
    )
    with pytest.raises(ValueError, match=r"'c' has 0 answers.*a, b"):
        changed(before, Variant(noise={"source": "c", "share": 0.3}), seed=0)


def test_duplicates_stand_in_the_data_so_often():
    before = rows("a", 10) + rows("b", 4)
    after = changed(before, Variant(duplicates={"times": 3, "share": 0.5}), seed=0)
    assert after[:14] == before
    times = Counter(row.messages for row in after)
    assert Counter(times.values()) == {1: 7, 3: 7}
    assert {row.source for row in after[14:]} == {"a (copies)", "b (copies)"}


def test_another_part_of_a_hub_data_set_is_other_data(tmp_path, monkeypatch):
    whole = datasets.Dataset.from_list(
        [{"messages": [asdict(m) for m in row.messages]} for row in rows("a", 8)]
    )
    whole.to_parquet(tmp_path / "rows.parquet")  # so that both parts are read from one file

    real = datasets.load_dataset

    def load(name, split):
        files, cache = str(tmp_path / "rows.parquet"), str(tmp_path / "cache")
        return real("parquet", data_files=files, split=split, cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", load)

    def made(part):
        data = {"train": [f"someone/data:train[{part}]"], "eval": ["someone/data"]}
        return write_data(read_study(study_file(tmp_path, data=data), None), tmp_path / "out")

    first = made(":50%")
    text = (tmp_path / "out" / "data" / "train-plain.jsonl").read_text()
    assert made(":50%") == first
    assert made("50%:")["hash"] != first["hash"]
    assert (tmp_path / "out" / "data" / "train-plain.jsonl").read_text() != text


def test_keys_follow_what_files_hold(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
        for file in ("rows.jsonl", "eval.jsonl", "valid.jsonl", "losses.jsonl", "tokenizer.json"):
            (tmp_path / name / file).write_text(file)
        (tmp_path / name / "model" / "weights").write_text("weights")

    def key(folder):
        config = tiny_config(
            "x",
            folder / "study" / "cells" / "one",
            model={"tokenizer": str(folder / "tokenizer.json")},
            data={"train": [str(folder / "rows.jsonl")], "eval": [str(folder / "eval.jsonl")]},
            selection={
                "validation": [str(folder / "valid.jsonl")],
                "reference_losses": str(folder / "losses.jsonl"),
            },
        )
        files = Keys()
        return files.of(config, files.of_path(str(folder / "model")))

    seen = {key(tmp_path / "a")}
    assert key(tmp_path / "b") in seen
    for path in sorted(p for p in (tmp_path / "b").rglob("*") if p.is_file()):
        path.write_text(path.read_text().upper())
        assert key(tmp_path / "b") not in seen
        seen.add(key(tmp_path / "b"))
    assert len(seen) == 7

    monkeypatch.setattr(keys, "LARGE_BYTES", 3)
    weights = tmp_path / "b" / "model" / "weights"
    before = key(tmp_path / "b")
    os.utime(weights, ns=(0, 0))
    assert key(tmp_path / "b") != before
    assert keys.path_facts("someone/hub-model") == "someone/hub-model"


def double(number):
    if number == 3:
        raise ValueError("three is refused\nand more")
    if number == 4:
        os._exit(9)
    return 2 * number, os.getpid()


def test_workers_outlive_failures_and_report_them():
    done = dict(run_tasks(double, [1, 2, 3, 4, 5, 6, 7], 2, "slap_ds.study.pool"))
    assert sorted(done) == [1, 2, 3, 4, 5, 6, 7]
    assert done[3].error == "ValueError: three is refused"
    assert "three is refused" in done[3].trace
    assert done[4] == Failure("its process died with exit code 9")
    good = {n: done[n] for n in (1, 2, 5, 6, 7)}
    assert {n: value for n, (value, _) in good.items()} == {1: 2, 2: 4, 5: 10, 6: 12, 7: 14}
    assert len({process for _, process in good.values()}) <= 3  # two, and one for the dead
