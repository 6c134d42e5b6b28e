"""Other architectures than LLaMA: the same picks and losses on ranks, or one clear refusal."""

from pathlib import Path

import pytest

from slap_ds.config.schema import Config
from slap_ds.jsonl import read_lines
from tests.ranks import run_ranks
from tests.recipes import losses, picks, run_config, tiny_config, tiny_model

pytestmark = pytest.mark.lane

SEPARATE = {"model": {"attention": "sdpa"}, "step": {"forward": "separate"}}
REUSE = {"model": {"gradient_checkpointing": True}, "step": {"forward": "reuse", "balance": "none"}}
CASES = {
    "qwen2": REUSE,
    "mistral": REUSE,
    "glm": REUSE,
    "gpt2": SEPARATE,
    "gpt2 reuse": REUSE,
    "mixtral": REUSE,  # with its routers' balance loss
    "qwen3_moe": REUSE,
    "glm4": REUSE,
    "glm4_moe": REUSE,
    "glm4_moe_lite": REUSE,
}
SHARED = {
    "mistral": {},
    "qwen2": {},
    "gpt2": {},
    "mixtral": {"output_router_logits": False},
    "deepseek_v3": {},
}
SLOW = ("gpt2 reuse", "qwen3_moe", "glm4_moe", "glm4_moe_lite")


def config(path: str, run_dir: Path, case: str, **sections) -> Config:
    common = {"steps": 5, "evaluation": {"max_samples": 2}}
    return tiny_config(path, run_dir, **{**common, **CASES.get(case, REUSE), **sections})


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES],
)
def test_slap_on_two_ranks_is_slap_in_one_process(case, tmp_path):
    model = tiny_model(tmp_path / "model", case.split()[0])
    run_config(config(model, tmp_path / "torch", case, engine={"kind": "torch"}))
    run_ranks(run_config, 2, config(model, tmp_path / "ranks", case))
    assert len(picks(tmp_path / "torch")) == 5
    assert picks(tmp_path / "ranks") == picks(tmp_path / "torch")
    steps = [read_lines(tmp_path / n / "metrics.jsonl") for n in ("ranks", "torch")]
    found, expected = map(losses, steps)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-5
    assert found[0] != found[-1]
    balances = [[r["balance_loss"] for r in each if "balance_loss" in r] for each in steps]
    assert len(balances[0]) == (5 if case == "mixtral" else 0)  # whose config asks for it
    assert balances[0] == pytest.approx(balances[1], abs=1e-5)
    assert len(set(balances[0])) == len(balances[0])


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow) if c != "mistral" else c for c in SHARED],
)
def test_ranks_that_share_rows_train_as_one_process(case, tmp_path):
    """Windows, learned positions, experts, keys wider than values."""
    model = tiny_model(tmp_path / "model", case, **SHARED[case])
    run_config(config(model, tmp_path / "torch", case, engine={"kind": "torch"}, **REUSE))
    shared = config(model, tmp_path / "ranks", case, engine={"sequence_parallel": 2}, **REUSE)
    run_ranks(run_config, 2, shared)
    assert picks(tmp_path / "ranks") == picks(tmp_path / "torch")
    found, expected = (
        losses(read_lines(tmp_path / n / "metrics.jsonl")) for n in ("ranks", "torch")
    )
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-5
    assert found[0] != found[-1]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "glm4", "glm4_moe", "glm4_moe_lite"])
def test_experts_and_later_glms_train_the_same_bits_reused_or_not(kind, tmp_path):
    model = tiny_model(tmp_path / "model", kind)
    curves = []
    for forward in ("separate", "reuse"):
        sections = {**REUSE, "step": {"forward": forward, "balance": "none"}}
        run = config(model, tmp_path / forward, kind, engine={"kind": "torch"}, **sections)
        curves.append(losses(run_config(run)))
    assert curves[0] == curves[1]
    assert curves[0][0] != curves[0][-1]


def test_gpt2_reuse_trains_the_same_bits_as_separate(tmp_path):
    """Its blocks take the mask by position."""
    model = tiny_model(tmp_path / "model", "gpt2")
    curves = []
    for attention in ("packed", "sdpa"):
        for forward in ("separate", "reuse"):
            run_dir = tmp_path / f"{attention}-{forward}"
            sections = {
                "engine": {"kind": "torch"},
                "model": {"gradient_checkpointing": True, "attention": attention},
                "step": {"forward": forward, "balance": "none"},
            }
            curves.append(losses(run_config(config(model, run_dir, "gpt2", **sections))))
    assert curves[0] == curves[1]
    # Over a whole row's mask the sums depend on what else the row holds.
    for a, b in zip(curves[2] + curves[3], curves[0] * 2, strict=True):
        assert abs(a - b) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "attention", "told"),
    [
        ("opt", "sdpa", "samples of a packed row see each other in opt with model.attention sdpa"),
        ("falcon", "packed", "model.attention is 'packed', which falcon does not have"),
        ("bloom", "sdpa", "model.attention is 'sdpa', which bloom does not have"),
        ("stablelm", "packed", "is not given the samples' lengths by its model"),
        ("bloom", "packed", "samples of a packed row see each other in bloom"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_one_line(kind, attention, told, tmp_path):
    fields = {
        "model_type": kind,
        "vocab_size": 2048,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        **{"stablelm": {"num_key_value_heads": 2}}.get(kind, {}),
    }
    sections = {
        "model": {"path": None, "config": fields, "attention": attention},
        "engine": {"kind": "torch"},
    }
    with pytest.raises(ValueError, match=r".") as caught:
        run_config(tiny_config("", tmp_path / "run", **sections))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
