"""Every curvature source and sketch gives the same curvature and picks on any number of ranks."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.recipes import picks, run_config, tiny_config, tiny_model

CASES = {
    "exact_head of some tokens": {"curvature_tokens": 0.5, "curvature_block": 3},
    "hutchinson_head, head_kron": {
        "curvature": "hutchinson_head",
        "sketch": "head_kron",
        "sketch_size": [4, 4],
        "probes": 4,
    },
    "hutchinson_blocks, unit norm": {
        "curvature": "hutchinson_blocks",
        "probes": 2,
        "blocks": 2,
        "sketch_norm": "unit",
    },
    "hvp": {"sketch": "hvp", "probes": 2},
    "projected": {"sketch_dim": 12},
}
# Run in the default tests: the others are the same code with other sums.
QUICK = {"hutchinson_blocks, unit norm", "projected"}
CASES_MARKED = [
    case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_model(folder / kind, kind) for kind in ("llama", "glm")}


def curvature(run_dir: Path) -> torch.Tensor | None:
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "state.safetensors").get("scorer.curvature.average")


def same_curvature(found, expected):
    if expected is None:
        assert found is None
        return
    error = (found - expected).norm() / expected.norm()
    assert error <= 1e-5, f"{error:.1e}"


@pytest.mark.parametrize("case", CASES_MARKED)
def test_ranks_agree(case, models, tmp_path):
    kind = "glm" if case == "hutchinson_head, head_kron" else "llama"

    def config(name, **sections):
        settings = {"steps": 2, "scoring": CASES[case], "evaluation": {"max_samples": 2}}
        return tiny_config(models[kind], tmp_path / name, **{**settings, **sections})

    run_config(config("torch", engine={"kind": "torch"}))
    expected, expected_picks = curvature(tmp_path / "torch"), picks(tmp_path / "torch")
    assert len(expected_picks) == 2
    for world in (1, 2, 4):
        run_ranks(run_config, world, config(f"w{world}"))
        assert picks(tmp_path / f"w{world}") == expected_picks, f"{world} ranks"
        same_curvature(curvature(tmp_path / f"w{world}"), expected)


@pytest.mark.parametrize("case", sorted(QUICK))
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stop_and_resume_give_the_same_curvature(world, case, models, tmp_path):

    def go(name):
        config = tiny_config(
            models["llama"],
            tmp_path / name,
            steps=4,
            scoring=CASES[case],
            checkpoint={"every": 2, "keep_last": 9},
            evaluation={"max_samples": 2},
            engine={"kind": "torch" if world == 1 else "deepspeed"},
        )
        if world == 1:
            run_config(config)
        else:
            run_ranks(run_config, world, config)

    go("whole")
    go("broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step-000004")
    go("broken")
    assert torch.equal(curvature(tmp_path / "broken"), curvature(tmp_path / "whole"))
    assert picks(tmp_path / "broken") == picks(tmp_path / "whole")


@pytest.mark.parametrize("case", sorted(QUICK))
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_forward_reuse_gives_the_same_curvature(world, case, models, tmp_path):
    """The blocks' second run takes its input from a forward that also keeps it."""

    def config(name, **sections):
        settings = {
            "steps": 3,
            "scoring": CASES[case],
            "model": {"gradient_checkpointing": True},
            "evaluation": {"max_samples": 2},
        }
        return tiny_config(models["llama"], tmp_path / name, **{**settings, **sections})

    run_config(config("separate", engine={"kind": "torch"}, step={"forward": "separate"}))
    reuse = config("reuse", step={"forward": "reuse", "balance": "none"})
    run_ranks(run_config, world, reuse)
    assert picks(tmp_path / "reuse") == picks(tmp_path / "separate")
    same_curvature(curvature(tmp_path / "reuse"), curvature(tmp_path / "separate"))


def sent_bytes(config):
    return [record["bytes_sent"] for record in run_config(config) if record["event"] == "train"]


def test_projected_sketches_are_what_travels(models, tmp_path):
    sent = {}
    for dim in (None, 12):
        config = tiny_config(
            models["llama"], tmp_path / str(dim), steps=1, scoring={"sketch_dim": dim}
        )
        sent[dim] = run_ranks(sent_bytes, 2, config)[0][0]
    # 16 candidates of width 32, or a little more where ranks hold unequal shares.
    assert 8 * 20 * 4 <= sent[None] - sent[12] <= 16 * 20 * 4


@pytest.mark.slow
def test_sketches_travel_in_bfloat16(models, tmp_path):
    sent = {}
    for dtype in ("float32", "bfloat16"):
        config = tiny_config(
            models["llama"], tmp_path / dtype, steps=2, scoring={"sketch_dtype": dtype}
        )
        sent[dtype] = run_ranks(sent_bytes, 2, config)[0][0]
    # 16 candidates of width 32, or a little more where ranks hold unequal shares.
    assert 8 * 32 * 2 <= sent["float32"] - sent["bfloat16"] <= 16 * 32 * 2
