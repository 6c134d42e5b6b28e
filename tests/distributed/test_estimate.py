"""The bytes that DeepSpeed holds for weights, gradients and optimizer are those of the estimate."""

import json
from pathlib import Path

import pytest
import torch

from slap_ds.config.schema import Config
from slap_ds.estimate import GRADIENTS, OPTIMIZER, WEIGHTS, Shape, estimate
from slap_ds.estimate.outlook import checkpoint_bytes
from slap_ds.models.load import load_config
from tests.ranks import run_ranks
from tests.recipes import tiny_config, tiny_model

pytestmark = pytest.mark.slow

CPU = {"device": "cpu", "pin_memory": False}
# Of one bucket's or one parameter's size, which is nothing in a large model.
SMALL = ("ipg_buckets", "temp_grad_buffer", "round_robin_bit16_meta")
CASES = {
    "zero 0": (0, "bfloat16", {}, None),
    "zero 0 float32": (0, "float32", {}, None),
    "zero 1": (1, "bfloat16", {}, None),
    "zero 1 float32 gradients": (1, "bfloat16", {}, "fp32"),
    "zero 1 offloaded": (1, "bfloat16", {"offload_optimizer": CPU}, None),
    "zero 2": (2, "bfloat16", {}, None),
    "zero 2 float32 gradients": (2, "bfloat16", {}, "fp32"),
    "zero 2 float32": (2, "float32", {}, None),
    "zero 2 offloaded": (2, "bfloat16", {"offload_optimizer": CPU}, None),
    "zero 3": (3, "bfloat16", {}, None),
    "zero 3 float32": (3, "float32", {}, None),
    "zero 3 offloaded": (3, "bfloat16", {"offload_optimizer": CPU}, None),
    "zero 3 all offloaded": (3, "bfloat16", {"offload_optimizer": CPU, "offload_param": CPU}, None),
    "zero 3 float32 gradients": (3, "bfloat16", {"offload_optimizer": CPU}, "fp32"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """case -> the config, bytes held on each of two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    # Wide enough that buckets and vectors of a block's width are small beside it.
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    model = tiny_model(folder / "model", **sizes)
    configs = []
    for case, (stage, dtype, offload, accumulate) in CASES.items():
        settings = json.loads(Path("configs/deepspeed/zero3-offload.json").read_text())
        del settings["zero_optimization"]["offload_optimizer"]
        settings["zero_optimization"] |= {"stage": stage, **offload}
        if accumulate:
            settings["data_types"] = {"grad_accum_dtype": accumulate}
        path = folder / f"{case}.json"
        path.write_text(json.dumps(settings))
        configs.append(
            tiny_config(
                model,
                folder / case,
                steps=2,
                model={"dtype": dtype},
                data={"eval": []},
                selection={"method": "full"},
                engine={"deepspeed": str(path)},
            )
        )
    by_rank = run_ranks(_all_held, 2, configs)
    return dict(zip(CASES, zip(configs, zip(*by_rank, strict=True), strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_what_deepspeed_holds_is_what_is_estimated(case, runs):
    config, held = runs[case]
    shape = Shape.of(load_config(config.model.path, None))
    e = estimate(config, shape, 64, 0.5, gpus=2, candidates_per_gpu=8)
    parts = [WEIGHTS, GRADIENTS, OPTIMIZER]
    expected = 2**30 * sum(e.memory_gib.get(p, 0) + e.host_gib.get(p, 0) for p in parts)
    assert held == pytest.approx([expected, expected], rel=0.03)


@pytest.mark.parametrize("case", ["zero 1", "zero 2 float32", "zero 3"])
def test_a_checkpoint_takes_what_is_estimated(case, runs):
    config, _ = runs[case]
    files = [f for f in (Path(config.run_dir) / "checkpoints").rglob("*") if f.is_file()]
    expected = checkpoint_bytes(config, Shape.of(load_config(config.model.path, None)))
    assert sum(f.stat().st_size for f in files) == pytest.approx(expected, rel=0.03)


def _all_held(configs: list[Config]) -> list[int]:
    # One after another in the same ranks, whose start takes longer than a run.
    return [_held(config) for config in configs]


def _held(config: Config) -> int:
    """Bytes of DeepSpeed's optimizer in the second step, after the backward that leaves most."""
    from slap_ds.train.loop import train
    from slap_ds.train.run import prepare

    run = prepare(config)
    engine, backward, found = run.engine, run.engine._backward, []

    def measured(loss, total_weight, last):
        backward(loss, total_weight, last)
        if run.state.step == 1:
            found.append(_bytes(engine))

    engine._backward = measured
    train(run)
    assert len(found) > 1, "one row: nothing was accumulated"
    return max(found)


def _bytes(engine) -> int:
    """Of all distinct tensors that hang on the model and on DeepSpeed's optimizer."""
    sizes: dict[int, int] = {}  # by address

    def count(value):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            for name in ("ds_tensor", "grad_accum"):
                count(getattr(value, name, None))
            count(value.grad if value.is_leaf else None)
        elif isinstance(value, dict):
            count([*value, *value.values()])
        elif isinstance(value, (list, tuple)):
            for x in value:
                count(x)

    count(list(engine.model.parameters()))
    count([x for name, x in vars(engine.optimizer).items() if not name.startswith(SMALL)])
    count(dict(getattr(engine.optimizer, "optimizer", engine.optimizer).state))
    return sum(sizes.values())
