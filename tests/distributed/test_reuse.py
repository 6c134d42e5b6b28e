"""Forward reuse against the plain two-pass step: the same bits, no more gathers."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from slap_ds.cli import main
from slap_ds.config.deepspeed import DEFAULT_DEEPSPEED
from slap_ds.config.file import write_config
from slap_ds.config.schema import Config
from slap_ds.estimate import Shape, row_gathers
from slap_ds.models.load import load_config
from tests.ranks import run_ranks
from tests.recipes import losses, picks, run_config, tiny_config, tiny_model

pytestmark = pytest.mark.lane

FORMS = {
    "llama": {},
    "glm": {},
    "tied": {"tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: tiny_model(folder / name, "glm" if name == "glm" else "llama", **changes)
        for name, changes in FORMS.items()
    }


def config(model: str, run_dir: Path, forward: str, **sections) -> Config:
    sections = {"step": {"forward": forward, "balance": "quota"}, **sections}
    return tiny_config(
        model,
        run_dir,
        model={"gradient_checkpointing": True},
        batch={"micro_batch_tokens": 256},
        **sections,
    )


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    from slap_ds.checkpoint import find as checkpoint
    from slap_ds.engine.whole_state import whole_weights

    return whole_weights(checkpoint.find(run_dir)[-1].folder)


@pytest.mark.parametrize("world", [0, pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_reuse_trains_the_same_bits_as_separate(form, world, models, tmp_path):
    """Loss curve, gradient norms and final weights, several packed rows a step."""
    found = {}
    for forward in ("separate", "reuse"):
        run_dir = tmp_path / forward
        # 0 ranks: the plain PyTorch engine in this process.
        kind = {"engine": {"kind": "torch" if world == 0 else "deepspeed"}}
        c = config(models[form], run_dir, forward, **kind)
        metrics = run_config(c) if world == 0 else run_ranks(run_config, world, c)[0]
        train = [r for r in metrics if r["event"] == "train"]
        assert {r["forward"] for r in train} == {forward}
        found[forward] = losses(metrics), [r["grad_norm"] for r in train], weights(run_dir)
    assert picks(tmp_path / "reuse") == picks(tmp_path / "separate")
    assert found["reuse"][0] == found["separate"][0]
    assert found["reuse"][1] == found["separate"][1]
    for name, value in found["separate"][2].items():
        assert torch.equal(found["reuse"][2][name], value), name


@pytest.mark.slow
def test_fifty_steps_stay_identical(models, tmp_path):
    curves = {}
    for forward in ("separate", "reuse"):
        c = config(models["llama"], tmp_path / forward, forward, steps=50)
        curves[forward] = losses(run_ranks(run_config, 2, c)[0])
    assert curves["reuse"] == curves["separate"]


def gathers(c: Config) -> dict[str, int]:
    """Bytes that ZeRO-3 all-gathered in the steps of a run, by DeepSpeed's own logger."""
    from deepspeed.comm import comm as ds_comm

    from slap_ds.data.batch import CandidateBatch
    from slap_ds.train.record import train_step
    from slap_ds.train.run import prepare

    run = prepare(c)
    steps = 4
    log = ds_comm.comms_logger
    for step in range(steps):
        if step == 1:  # the first one records the trace
            log.comms_dict.clear()
        train_step(run, step, CandidateBatch(run.inputs.train, next(run.stream)))
    sizes = [
        (size, entry[0])
        for name, by_size in log.comms_dict.items()
        if "all_gather" in name or "allgather" in name
        for size, entry in by_size.items()
    ]
    return {"bytes": sum(s * n for s, n in sizes), "calls": sum(n for _, n in sizes)}


def test_reuse_gathers_no_more_than_full_training(models, tmp_path):
    """Full training with checkpointing against reuse at 40 % pruning, on the same candidates."""
    settings = json.loads(DEFAULT_DEEPSPEED.read_text())
    settings["comms_logger"] = {"enabled": True, "prof_all": True, "verbose": False}
    # As for a model that does not fit: nothing stays gathered between forward and backward.
    settings["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
    }
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    found = {}
    for name, sections in {
        "full": {"selection": {"method": "full"}},
        "reuse": {"selection": {"keep": 0.6}},
    }.items():
        c = config(
            models["llama"],
            tmp_path / name,
            "reuse",
            engine={"deepspeed": str(tmp_path / "ds.json")},
            evaluation={"max_samples": 2},
            **sections,
        )
        # Several rows a rank, so that rounding up to whole rows does not decide.
        c = c.model_copy(update={"batch": c.batch.model_copy(update={"candidates": 48})})
        found[name] = run_ranks(gathers, 2, c)[0]
    assert found["full"]["bytes"] > 0
    assert found["reuse"]["bytes"] <= found["full"]["bytes"], found
    assert found["reuse"]["calls"] <= found["full"]["calls"], found


def gathers_by_part(c: Config) -> dict[str, float]:
    """How often the third step gathers the weights of embedding, blocks and head, by phase.

    Also how many rows it trained, and how many weights were gathered without a recorded order.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator as deepspeed_gathers

    from slap_ds.data.batch import CandidateBatch
    from slap_ds.models.blocks import find_blocks
    from slap_ds.train.record import train_step
    from slap_ds.train.run import prepare

    run = prepare(c)
    engine, lm = run.engine, run.engine.model.lm
    parts = {
        "embedding": [lm.get_input_embeddings().weight],
        "blocks": [p for block in find_blocks(lm) for p in block.parameters()],
        "head": [lm.get_output_embeddings().weight],
    }
    shares = {
        p.ds_id: (name, p.ds_numel / sum(x.ds_numel for x in weights))
        for name, weights in parts.items()
        for p in weights
    }
    kind = deepspeed_gathers.PartitionedParameterCoordinator
    name = "_PartitionedParameterCoordinator__all_gather_params_"
    gather, forward, backward = getattr(kind, name), engine._forward, engine._backward
    found, phase, gathered = {}, "", 0

    def counted(self, weights, *rest, **named):
        nonlocal gathered
        for weight in weights:
            if weight.ds_status == deepspeed_gathers.ZeroParamStatus.NOT_AVAILABLE:
                gathered += weight.ds_numel
                part, share = shares.get(weight.ds_id, ("rest", 1))
                found[f"{part}, {phase}"] = found.get(f"{part}, {phase}", 0) + share
                found["without order"] += not self.is_complete_trace()
        return gather(self, weights, *rest, **named)

    def forward_of(row, mode, request):
        nonlocal phase
        phase = f"{mode} forward"
        found["rows"] += mode == "train"
        return forward(row, mode, request)

    def backward_of(*args, **named):
        nonlocal phase
        phase = "backward"
        return backward(*args, **named)

    setattr(kind, name, counted)
    engine._forward, engine._backward = forward_of, backward_of
    for step in range(3):
        found.clear()
        gathered = 0
        found |= {"rows": 0, "without order": 0}
        train_step(run, step, CandidateBatch(run.inputs.train, next(run.stream)))
    named = {key: round(v, 9) for key, v in found.items() if not key.startswith("rest")}
    model_size = sum(p.ds_numel for p in lm.parameters())
    return {**named, "whole": gathered / model_size}


@pytest.mark.parametrize("form", ["llama", "tied"])
@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_single_row_gathers_no_more_than_full_training(form, world, models, tmp_path):
    """Of embedding, blocks and head; of the final norm, which stays by default, it does."""
    settings = json.loads(DEFAULT_DEEPSPEED.read_text())
    # As for a model that does not fit: nothing stays gathered between forward and backward.
    settings["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
    }
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    found = {}
    for name, selection in {"full": {"method": "full"}, "reuse": {"keep": 0.6}}.items():
        c = config(
            models[form],
            tmp_path / name,
            "reuse",
            engine={"deepspeed": str(tmp_path / "ds.json")},
            evaluation={"max_samples": 2},
            selection=selection,
        )
        c = c.model_copy(
            update={
                "batch": c.batch.model_copy(
                    update={"candidates": 4 * world, "micro_batch_tokens": 4096}
                )
            }
        )
        found[name] = run_ranks(gathers_by_part, world, c)[0]
    shape = Shape.of(load_config(models[form], None))
    once = {
        "full": dict.fromkeys(["train forward", "backward"], 1),
        "reuse": dict.fromkeys(["score forward", "backward"], 1),
    }
    for name, by_phase in once.items():
        # The head is met last in the forward and first in the backward: one gather serves both, and
        # of a scored row its first replayed one too. Nothing else is used in a replayed forward.
        expected = {f"{part}, {p}": 1 for part in ("embedding", "blocks") for p in by_phase}
        expected |= {f"head, {next(iter(by_phase))}": 1}
        if form == "tied":  # its one weight is counted as the head's
            expected = {key.replace("embedding", "head"): 1 for key in expected}
        # So `slap-ds estimate` has it, which leaves out the norms.
        whole = sum(row_gathers(shape, int(name == "reuse"), 1, name == "reuse"))
        assert found[name].pop("whole") == pytest.approx(whole, abs=0.01)
        assert found[name] == {"rows": 1, "without order": 0, **expected}, name


def forget_one_block(monkeypatch):
    """As if a later transformers called a block past its boundary."""
    from slap_ds.models import reuse

    own, blocks = reuse.own, []

    def own_all_but_the_first(block, inputs):
        if blocks:
            own(block, inputs)
        blocks.append(block)

    monkeypatch.setattr(reuse, "own", own_all_but_the_first)


def test_a_block_that_never_records_stops_the_run_before_training(
    models, tmp_path, monkeypatch, capsys
):
    forget_one_block(monkeypatch)
    c = config(models["llama"], tmp_path / "run", "reuse", engine={"kind": "torch"})
    write_config(c, tmp_path / "config.yaml")
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(tmp_path / "config.yaml")])
    assert stopped.value.code == 1
    told = capsys.readouterr().err.split("slap-ds: error")[1]
    version = transformers.__version__
    assert f"does not work with LlamaForCausalLM of transformers {version}: 2 of 3" in told
    assert "\n" not in told.strip()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_auto_goes_on_without_reuse_where_a_block_never_records(
    models, tmp_path, monkeypatch, capsys
):
    c = config(models["llama"], tmp_path / "separate", "separate", engine={"kind": "torch"})
    expected = losses(run_config(c))
    forget_one_block(monkeypatch)
    c = config(models["llama"], tmp_path / "auto", "auto", engine={"kind": "torch"})
    found = run_config(c)
    assert {r["forward"] for r in found if r["event"] == "train"} == {"separate"}
    assert losses(found) == expected
    assert "step.forward: separate, because" in capsys.readouterr().err


def test_host_boundaries_change_nothing(models, tmp_path):
    curves = {}
    for where in ("device", "host"):
        c = config(
            models["llama"],
            tmp_path / where,
            "reuse",
            engine={"kind": "torch"},
            step={"forward": "reuse", "balance": "none", "boundaries": where},
        )
        curves[where] = losses(run_config(c))
    assert curves["host"] == curves["device"]
