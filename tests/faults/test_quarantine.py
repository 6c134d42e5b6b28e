"""Samples whose loss is NaN or infinite: never trained, told by id; the weights stay finite."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slap_ds.checkpoint import find as checkpoint
from slap_ds.engine.whole_state import whole_weights
from slap_ds.train.inputs import read_inputs
from tests.ranks import run_ranks
from tests.recipes import picks, run_config, tiny_config, tiny_model

pytestmark = pytest.mark.fault_row(8)
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A model with NaN in the embedding of one rare token: (folder, token)."""
    folder = tmp_path_factory.mktemp("broken")
    model = tiny_model(folder / "model", "llama", tie_word_embeddings=False)
    store = read_inputs(tiny_config(model, folder / "run")).train
    holders: dict[int, set[int]] = {}
    for i in range(len(store)):
        for token in np.unique(store[i].ids).tolist():
            holders.setdefault(token, set()).add(i)
    # Not a token of the check that samples of a row do not see each other.
    used = set((np.arange(1, 19) * 7919 % 2048).tolist())
    token = min(
        (t for t, found in holders.items() if 3 <= len(found) <= 6 and t not in used), default=None
    )
    assert token is not None
    weights = load_file(folder / "model" / "model.safetensors")
    weights[EMBEDDING][token] = float("nan")
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    ids = {int(store.sample_ids[i]) for i in holders[token]}
    return model, token, ids


def config(broken, run_dir: Path, method: str, kind: str, **more):
    sections = {
        "data": {"eval": []},
        "selection": {"method": method, "keep": 0.6},
        "engine": {"kind": kind},
        # The whole data set once: every broken sample is a candidate.
        "steps": None,
        "epochs": 1,
        "batch": {"candidates": 24, "micro_batch_tokens": 256},
    }
    return tiny_config(broken[0], run_dir, **{**sections, **more})


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def finite_but(token: int, run_dir: Path) -> dict[str, torch.Tensor]:
    weights = whole_weights(checkpoint.find(run_dir)[-1].folder)
    weights[EMBEDDING] = weights[EMBEDDING].clone()
    weights[EMBEDDING][token] = 0
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    return weights


@pytest.mark.parametrize("method", ["slap", "hard"])
def test_broken_candidates_are_told_and_never_trained(method, broken, tmp_path):
    run_config(config(broken, tmp_path / "run", method, "torch"))
    told = lines(tmp_path / "run" / "quarantine.jsonl")
    assert {line["id"] for line in told} == broken[2]
    assert all("not selected: loss nan" in line["reason"] for line in told)
    trained = {number for ids in picks(tmp_path / "run") for number in ids}
    assert not trained & broken[2]
    assert len(trained) > 50
    finite_but(broken[1], tmp_path / "run")
    assert not any("skipped" in line for line in lines(tmp_path / "run" / "metrics.jsonl"))


def test_without_scores_the_step_is_skipped_and_its_row_told(broken, tmp_path):
    run_config(config(broken, tmp_path / "run", "full", "torch"))
    told = lines(tmp_path / "run" / "quarantine.jsonl")
    assert broken[2] <= {line["id"] for line in told}
    metrics = [x for x in lines(tmp_path / "run" / "metrics.jsonl") if x["event"] == "train"]
    skipped = {x["step"] for x in metrics if x.get("skipped")}
    assert skipped == {line["step"] for line in told}
    assert 0 < len(skipped) < len(metrics)
    assert all((x["loss"] is None) == (x["step"] in skipped) for x in metrics)
    finite_but(broken[1], tmp_path / "run")


def test_three_skipped_steps_in_a_row_stop_the_run(broken, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(broken[0], model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    run = tiny_config(
        str(model),
        tmp_path / "run",
        data={"eval": []},
        selection={"method": "full"},
        engine={"kind": "torch"},
        steps=9,
    )
    from slap_ds.train import run as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "check_isolation", lambda *_: None)
        with pytest.raises(ValueError, match=r"3 steps in a row .* sample ids .*diverged"):
            run_config(run)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 2


@pytest.mark.faults
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["slap", "full"])
def test_every_rank_and_stage_does_the_same(method, stage, broken, tmp_path):
    settings = json.loads(Path("configs/deepspeed/zero2.json").read_text())
    settings["zero_optimization"]["stage"] = stage
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    alone = config(broken, tmp_path / "alone", method, "torch")
    ranks = config(
        broken,
        tmp_path / "ranks",
        method,
        "deepspeed",
        engine={"kind": "deepspeed", "deepspeed": str(tmp_path / "ds.json")},
    )
    run_config(alone)
    run_ranks(run_config, 2, ranks)
    assert picks(tmp_path / "ranks") == picks(tmp_path / "alone")
    told, expected = (lines(tmp_path / name / "quarantine.jsonl") for name in ("ranks", "alone"))
    assert {line["step"] for line in told} == {line["step"] for line in expected}
    assert broken[2] <= {line["id"] for line in told}
    if stage:  # ZeRO 0 keeps its weights in DeepSpeed's own precision and file
        ours, theirs = (finite_but(broken[1], tmp_path / name) for name in ("ranks", "alone"))
        assert all(torch.allclose(ours[n], theirs[n], atol=1e-4) for n in theirs)
