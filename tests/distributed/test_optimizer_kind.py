"""DeepSpeed's AdamW against torch's: the same losses, and states that take over from each other."""

import shutil
from pathlib import Path

import pytest
import torch

from slap_ds.config.schema import Config
from slap_ds.engine.base import make_optimizer
from slap_ds.jsonl import read_lines
from tests.ranks import run_ranks
from tests.recipes import losses, run_config, tiny_config, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def config(model, folder: Path, kind: str, offload: bool = False, **sections) -> Config:
    file = "zero3-offload" if offload else "zero2"
    return tiny_config(
        model,
        folder,
        optimizer={"kind": kind, "weight_decay": 0.1, "lr": 5e-3},
        engine={"deepspeed": f"configs/deepspeed/{file}.json"},
        checkpoint={"every": 5, "keep_last": 3, **sections},
    )


def on_two_ranks(config: Config) -> list[float]:
    run_ranks(run_config, 2, config)
    return losses(read_lines(Path(config.run_dir) / "metrics.jsonl"))


def as_of_step_5(config: Config, reference: Path) -> None:
    """Its run folder holds the first half of the run at `reference`."""
    folder = Path(config.run_dir)
    shutil.copytree(reference, folder)
    for later in (folder / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > 5:
            shutil.rmtree(later)


@pytest.mark.slow  # DeepSpeed compiles its AdamW
@pytest.mark.parametrize("offload", [False, True])
def test_both_train_the_same_and_go_on_from_each_other(offload, model, tmp_path):
    """ZeRO-2, and ZeRO-3 with the optimizer offloaded; torch's AdamW is the reference."""
    whole = {
        kind: on_two_ranks(config(model, tmp_path / kind, kind, offload))
        for kind in ("torch", "deepspeed")
    }
    assert len(whole["torch"]) == 10
    assert whole["torch"][-1] < 0.97 * whole["torch"][0]
    assert whole["deepspeed"] == pytest.approx(whole["torch"], rel=1e-4)
    for kind, other in (("torch", "deepspeed"), ("deepspeed", "torch")):
        moved = config(model, tmp_path / f"{kind}-{other}", other, offload, reshard=True)
        as_of_step_5(moved, tmp_path / kind)
        after = on_two_ranks(moved)[-5:]
        assert after == pytest.approx(whole["torch"][5:], rel=1e-4)
        refused = config(model, tmp_path / f"{kind}-refused", other, offload)
        as_of_step_5(refused, tmp_path / kind)
        with pytest.raises(AssertionError, match=f"was saved with optimizer.kind = {kind}, this"):
            on_two_ranks(refused)


def test_the_engine_of_one_process_has_torchs_alone(model, tmp_path):
    with pytest.raises(ValueError, match=r"optimizer\.kind deepspeed needs engine.kind deepspeed"):
        tiny_config(model, tmp_path, optimizer={"kind": "deepspeed"}, engine={"kind": "torch"})


@pytest.mark.parametrize(("on_host", "name"), [(True, "DeepSpeedCPUAdam"), (False, "FusedAdam")])
def test_which_one_and_with_what(on_host, name, model, tmp_path, monkeypatch):
    """The kernels need a compiler and a GPU: here for what they are asked."""
    import deepspeed.ops.adam as adam

    made = []
    monkeypatch.setattr(adam, name, lambda parameters, **how: made.append((parameters, how)))
    weights = [torch.nn.Parameter(torch.zeros(3))]
    o = config(model, tmp_path, "deepspeed").optimizer
    make_optimizer(config(model, tmp_path, "deepspeed"), weights, on_host)
    expected = {"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": 0.1}
    assert made == [(weights, expected)]


@pytest.mark.parametrize("on_host", [True, False])
def test_a_machine_without_a_compiler_is_told_in_one_line(on_host, model, tmp_path, monkeypatch):
    import deepspeed.ops.adam as adam

    def broken(*arguments, **options):
        try:
            raise FileNotFoundError("no ninja\nlog of the build")
        except FileNotFoundError as error:
            raise RuntimeError("the op failed to load") from error

    monkeypatch.setattr(adam, "DeepSpeedCPUAdam", broken)
    monkeypatch.setattr(adam, "FusedAdam", broken)
    with pytest.raises(ValueError, match=r"cannot be compiled here \(no ninja\): install") as told:
        make_optimizer(config(model, tmp_path, "deepspeed"), [], on_host)
    assert "\n" not in str(told.value)
    assert ("CUDA toolkit" in str(told.value)) == (not on_host)
    assert str(told.value).endswith("or set optimizer.kind torch")
