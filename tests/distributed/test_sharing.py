"""engine.sequence_parallel: ranks that share their rows compute what one rank would."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from slap_ds.checkpoint import find as checkpoint
from slap_ds.config.schema import Config
from slap_ds.data.packing import Candidate, make_row
from slap_ds.engine import TorchEngine, start_ranks
from slap_ds.engine.process_group import split_rows
from slap_ds.engine.whole_state import whole_weights
from slap_ds.jsonl import read_lines
from slap_ds.models.load import load_config
from slap_ds.models.split import ALONE
from slap_ds.scoring import ScoreRequest
from tests.ranks import run_ranks
from tests.recipes import losses, picks, run_config, tiny_config, tiny_model

pytestmark = pytest.mark.lane

# Heads for four ranks, those of keys and values for two: four ranks get copies of them.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
REUSE = {"model": {"gradient_checkpointing": True}, "step": {"balance": "none"}}
LENGTHS = (13, 40, 7, 30, 21)
REQUESTS = {
    "exact": ScoreRequest("head_input", "exact_head", token_share=0.5),
    "kron": ScoreRequest("head_kron", "hutchinson_head", probes=3, size=(4, 4)),
    "hvp": ScoreRequest("hvp", probes=3, sketch_dim=8, extras=("el2n", "hidden")),
    "blocks": ScoreRequest("head_input", "hutchinson_blocks", probes=2, blocks=1),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_model(folder / kind, kind, **HEADS) for kind in ("llama", "glm")}


def scores_and_gradients(config: Config) -> dict[str, float]:
    """In float64, without ZeRO: the largest difference from the whole rows, by what differs."""
    comm = start_ranks(config)
    config = tiny_config(config.model.path, Path(config.run_dir), engine={"kind": "torch"}, **REUSE)
    engine = TorchEngine(config, load_config(config.model.path, None))
    engine.model.double()
    rng = np.random.default_rng(1)
    every = [
        Candidate(i, rng.integers(3, 2000, n), rng.random(n) < 0.5) for i, n in enumerate(LENGTHS)
    ]
    scored, picked = [make_row(every[:3]), make_row(every[3:])], [make_row(every[1:4:2])]
    found = {}
    for split in (ALONE, split_rows(comm)):
        engine.model.split = split
        values = {
            f"{name} {field}": value
            for name, request in REQUESTS.items()
            for field, value in vars(engine.score(scored, request)).items()
            if isinstance(value, torch.Tensor)
        }
        for replay in (False, True):
            if replay:
                engine.score(scored, ScoreRequest(), keep=True)
                engine._inputs().start_replay(picked)
            engine.model.zero_grad()
            loss = engine._forward(engine._part(picked[0]), "train", None)
            loss.backward()
            engine._inputs().stop()
            every_gradient = [p.grad.flatten() for p in engine.model.parameters()]
            values[f"gradient {replay}"] = split.sum(torch.cat(every_gradient))
            values[f"loss {replay}"] = split.sum(loss.detach())
        found[split.ranks] = values
    whole, shared = found[1], found[comm.sharing]
    assert whole.keys() == shared.keys()
    assert len(whole) > 20
    dist.barrier()
    return {n: float((whole[n] - x).abs().max() / (1 + x.abs().max())) for n, x in shared.items()}


@pytest.mark.parametrize("kind", ["llama", "glm"])
@pytest.mark.parametrize("world", [2, 4])
def test_parts_add_up_to_the_row_in_float64(world, kind, models, tmp_path):
    """Losses, sketches, curvatures and gradients, with and without reuse."""
    config = tiny_config(models[kind], tmp_path, engine={"sequence_parallel": world})
    for differences in run_ranks(scores_and_gradients, world, config):
        # transformers' norms round to float32 in between, and the probes' signs are float32.
        assert {n: d for n, d in differences.items() if d > 1e-12} == {}


def weights(run_dir: Path) -> torch.Tensor:
    found = whole_weights(checkpoint.find(run_dir)[-1].folder)
    return torch.cat([found[name].flatten() for name in sorted(found)])


def test_an_adapter_trains_the_same(models, tmp_path):
    lora = {"model": {**REUSE["model"], "lora": {"r": 4}}, "optimizer": {"lr": 1e-2}, "steps": 5}
    plain = tiny_config(models["llama"], tmp_path / "one", engine={"kind": "torch"}, **lora)
    expected = losses(run_config(plain))
    shared = tiny_config(models["llama"], tmp_path / "two", engine={"sequence_parallel": 2}, **lora)
    found = losses(run_ranks(run_config, 2, shared)[0])
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-5
    assert picks(tmp_path / "two") == picks(tmp_path / "one")
    difference = (weights(tmp_path / "two") - weights(tmp_path / "one")).abs()
    # AdamW's first steps magnify rounding where a gradient is next to nothing.
    assert float(difference.mean()) <= 1e-5


def test_a_run_goes_on_bit_for_bit_and_with_groups_of_another_size(models, tmp_path):
    def go(name, sharing):
        config = tiny_config(
            models["llama"],
            tmp_path / name,
            steps=6,
            engine={"sequence_parallel": sharing},
            checkpoint={"every": 3, "keep_last": 9},
            **REUSE,
        )
        run_ranks(run_config, 2, config)
        found = read_lines(tmp_path / name / "metrics.jsonl")
        evals = [r["eval_loss"] for r in found if r["event"] == "eval"]
        assert (len(losses(found)), len(evals)) == (6, 2)
        return losses(found) + evals

    whole = go("whole", 2)
    for name in ("again", "alone"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints/step-000006")
    assert go("again", 2) == whole
    assert torch.equal(weights(tmp_path / "again"), weights(tmp_path / "whole"))
    assert max(abs(a - b) for a, b in zip(go("alone", 1), whole, strict=True)) <= 1e-5
    for name in ("again", "alone"):
        assert picks(tmp_path / name) == picks(tmp_path / "whole")


def error_of(config: Config, shifted: bool) -> str:
    from slap_ds.engine import zero

    if shifted:  # a layer that looks at the token before
        load = zero.load_lm

        def load_shifted(*args):
            lm = load(*args)
            lm.model.layers[0].mlp.register_forward_hook(lambda m, x, out: out + out.roll(1, 1) / 9)
            return lm

        zero.load_lm = load_shifted
    try:
        run_config(config)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("sharing", "shifted", "method", "told"),
    [
        (2, True, "slap", "llama has more than attention that looks at other tokens"),
        (4, False, "slap", "4, which does not divide 2 ranks"),
        (2, False, "uds", "selection.method uds takes the nuclear norm"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(
    sharing, shifted, method, told, models, tmp_path
):
    config = tiny_config(
        models["llama"],
        tmp_path / "run",
        engine={"sequence_parallel": sharing},
        selection={"method": method},
    )
    for text in run_ranks(error_of, 2, config, shifted):
        assert told in text
        assert "\n" not in text


@pytest.mark.parametrize(
    "sections", [{"engine": {"kind": "torch"}}, {"model": {"attention": "sdpa"}}]
)
def test_only_packed_attention_under_deepspeed_is_shared(sections, models, tmp_path):
    engine = {"sequence_parallel": 2, **sections.pop("engine", {})}
    told = "engine.sequence_parallel 2 needs engine.kind deepspeed"
    with pytest.raises(ValueError, match=re.escape(told)):
        tiny_config(models["llama"], tmp_path, engine=engine, **sections)
