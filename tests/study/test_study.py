"""Studies in parts: the plan, the rows, the workers."""

import difflib
import json
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

from slap_ds.config.methods import SampledConfig
from slap_ds.config.schema import SelectionConfig
from slap_ds.data.formats import Conversation, Message
from slap_ds.study import keys
from slap_ds.study.data import changed, edited, split, write_data
from slap_ds.study.keys import Keys
from slap_ds.study.plan import Cell, Variant, all_configs, base_config, plan, read_study
from slap_ds.study.pool import Failure, run_tasks
from slap_ds.study.vocabulary import make_vocabulary
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
    assert Cell("full", 1.0, None, "noisy", 3, 0.7).name == "full-keep1-noisy-cost0.7-seed3"
    grid = [{"methods": ["full", "slap"], "keep": [0.6], "cost": [0.7, 1], "seeds": [1]}]
    cells = plan(read_study(study_file(tmp_path, grid=grid), None))
    # The whole cost is the reference's own run.
    assert [cell.name for cell in cells] == [
        "full-keep1-cost0.7-seed1",
        "full-keep1-seed1",
        "slap-keep0.6-cost0.7-seed1",
        "slap-keep0.6-cost1-seed1",
    ]


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
        grid=[
            {"methods": ["slop"], "keep": [1.5], "seeds": [1], "variants": ["noise"], "cost": [0]}
        ],
        reference="slap",
        base={"config": "base.yaml", "vocabulary": 300},
    )
    with pytest.raises(ValueError, match="1 mistake") as caught:
        read_study(path, None)
    for part in (
        "grid.0.methods: 'slop'",
        "grid.0.keep: 1.5",
        "grid.0.variants: 'noise'",
        "grid.0.cost: 0",
        "base.vocabulary: it is made of the rows of `data`",
        "the reference trains all candidates",
    ):
        assert part in str(caught.value)


def committed():
    files = sorted(STUDIES.glob("*.yaml"))
    return [path.stem for path in files if yaml.safe_load(path.read_text()).get("grid")]


@pytest.mark.parametrize("name", committed())
def test_committed_studies_are_valid(name, tmp_path):
    study = read_study(str(STUDIES / f"{name}.yaml"), str(tmp_path))
    cells = plan(study)
    configs = all_configs(study, cells, tmp_path)
    assert len({config.run_dir for config in configs.values()}) == len(cells) >= 10
    base = base_config(study, tmp_path)
    if base is not None:
        assert base.checkpoint.last
        assert not any(config.checkpoint.last for config in configs.values())


REGIMES = ("new-domain", "epochs", "redundancy", "noise", "dominated")


@pytest.mark.parametrize("name", REGIMES)
def test_regimes_compare_the_same_methods_at_the_same_cost(name, tmp_path):
    study = read_study(str(STUDIES / f"{name}.yaml"), str(tmp_path))
    seeds = {}
    for cell in plan(study):
        seeds.setdefault((cell.method, cell.keep, cell.cost), set()).add(cell.seed)
    for method, count in {"random": 5, "default": 5, "paper": 3, "hard": 3, "uds": 3}.items():
        assert len(seeds[method, 0.6, 0.7]) == count
    for method in ("selective_backprop", "infobatch"):
        assert len(seeds[method, 0.6, 0.7]) == 3
    for method in ("random", "default"):
        assert len(seeds[method, 0.8, 0.7]) == 3
    assert len(seeds["full", 1.0, None]) == len(seeds["full", 1.0, 0.7]) == 5
    # The default is what a user gets without a word about selection.
    assert study.methods["default"] == {}
    assert study.min_gain == 10


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


def test_noise_without_a_source_is_in_every_source_and_stays_inside_it():
    before = rows("a", 20) + rows("b", 8)
    after = changed(before, Variant(noise={"share": 0.25}), seed=0)
    wrong = [i for i in range(28) if after[i].messages != before[i].messages]
    assert [sum(i < 20 for i in wrong), sum(i >= 20 for i in wrong)] == [5, 2]
    for i in wrong:
        assert after[i].source == f"{before[i].source} (noise)"
        assert after[i].messages[1].content.startswith(f"{before[i].source} a")


def test_near_duplicates_are_edited_by_a_share_of_their_words():
    text = " ".join(f"w{i}" for i in range(40))
    row = Conversation((Message("user", "one two"), Message("assistant", text)), "t", "a")
    copies = changed([row], Variant(duplicates={"times": 3, "edited": 0.1}), seed=0)
    assert copies[0] == row
    assert len({copy.messages[1].content for copy in copies}) == 3
    for copy in copies[1:]:
        assert copy.messages[0].content == "one two"  # too short to be edited
        # Independently: the longest common subsequence, which a drop, a doubled word or a swap
        # leaves all but one word of.
        ours, theirs = text.split(), copy.messages[1].content.split()
        matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
        same = sum(block.size for block in matcher.get_matching_blocks())
        assert 40 - 8 <= same < 40 or len(theirs) > 40
        assert abs(len(theirs) - 40) <= 4
    generator = np.random.default_rng(0)
    chinese = Conversation((Message("user", "你知道这部电影是谁导演的吗"),), "t", "a")
    assert edited(chinese, 0.1, generator).messages[0].content != chinese.messages[0].content
    assert edited(row, 0, generator) is row


def test_rows_of_a_source_instead_of_per_source():
    base, rest = split(rows("a", 30) + rows("b", 30), 5, 0.0, seed=0, of_source={"b": 20})
    assert not base
    assert Counter(row.source for row in rest) == {"a": 5, "b": 20}
    with pytest.raises(ValueError, match="no source 'c'; the sources are a"):
        split(rows("a", 3), 5, 0.0, seed=0, of_source={"c": 20})


def test_vocabulary_holds_every_text_and_is_made_the_same_twice(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"the thing number {i} 你好"}]})
            + "\n"
            for i in range(50)
        )
    )
    for name in ("one", "two"):
        make_vocabulary(source, 280, tmp_path / f"{name}.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    tokenizer = Tokenizer.from_file(str(tmp_path / "one.json"))
    text = "any text ☃ at all\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert tokenizer.get_vocab_size() == 280
    with pytest.raises(ValueError, match="take fewer pieces or more rows"):
        make_vocabulary(source, 5000, tmp_path / "three.json")


def test_duplicates_stand_in_the_data_so_often():
    before = rows("a", 10) + rows("b", 4)
    after = changed(before, Variant(duplicates={"times": 3, "share": 0.5}), seed=0)
    assert after[:14] == before
    times = Counter(row.messages for row in after)
    assert Counter(times.values()) == {1: 7, 3: 7}
    assert {row.source for row in after[14:]} == {"a (copies)", "b (copies)"}


def test_another_part_of_a_hub_data_set_is_other_data(tmp_path, monkeypatch):
    whole = datasets.Dataset.from_list(
        [
            {"messages": [{"role": m.role, "content": m.content} for m in row.messages]}
            for row in rows("a", 8)
        ]
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


def test_defaults_count_in_the_keys_of_the_default_method_alone(tmp_path):
    config = tiny_config("x", tmp_path / "run")
    other = config.selection.model_copy(update={"method": "hard"})
    default = config.selection.model_copy(update={"method": SelectionConfig().method})
    found = keys.settings_of(config.model_copy(update={"selection": default}))
    assert found["selection"]["sampled"] == config.selection.sampled.model_dump()
    assert not {"slap", "options"} & set(found["selection"])  # of methods that it is not
    assert "scoring" not in found  # it looks at no score
    scored = default.model_copy(update={"sampled": SampledConfig(by="loss")})
    found = keys.settings_of(config.model_copy(update={"selection": scored}))
    assert found["scoring"]["sketch"] == config.scoring.sketch
    found = keys.settings_of(config.model_copy(update={"selection": other}))
    assert "sampled" not in found["selection"]
    assert "scoring" not in found


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
