"""Liger's kernels: put where they belong, before reuse; refused in one line where they cannot run.

They need a GPU. A stand-in of the same shape replaces the forwards of a model's layers by PyTorch's
operators in another order, as Liger does with Triton's.
"""

import sys
from pathlib import Path
from types import MethodType, ModuleType

import pytest
import torch

from slap_ds.config.schema import Config
from slap_ds.engine import TorchEngine
from slap_ds.models import kernels
from slap_ds.models.kernels import use_liger
from slap_ds.models.load import load_config
from tests.recipes import losses, picks, run_config, tiny_config, tiny_model


def norm(self, hidden):
    scale = torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + self.variance_epsilon)
    return (self.weight.float() * (hidden.float() * scale)).to(hidden.dtype)


def swiglu(self, x):
    gate = self.gate_proj(x)
    return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))


@pytest.fixture
def liger(monkeypatch):
    """The stand-in; what it was called with."""
    called = []

    def apply(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, model=None):
        called.append((rope, cross_entropy, fused_linear_cross_entropy))
        for layer in model.model.layers:
            layer.mlp.forward = MethodType(swiglu, layer.mlp)
            for one in (layer.input_layernorm, layer.post_attention_layernorm):
                one.forward = MethodType(norm, one)

    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    monkeypatch.setattr(kernels, "is_available", lambda: True)
    return called


def config(model: str, folder: Path, which: str, **sections) -> Config:
    return tiny_config(
        model,
        folder,
        steps=4,
        engine={"kind": "torch"},
        model={"kernels": which, "gradient_checkpointing": True},
        data={"eval": []},
        **sections,
    )


def test_they_are_put_in_without_losses_and_reuse_keeps_its_bits(tmp_path, liger):
    model = tiny_model(tmp_path / "model")
    found, chosen = {}, {}
    for which in ("torch", "liger"):
        for forward in ("separate", "reuse"):
            folder = tmp_path / which / forward
            one = config(model, folder, which, step={"forward": forward})
            found[which, forward] = losses(run_config(one))
            chosen[which, forward] = picks(folder)
    assert liger == [(True, False, False)] * 2
    assert found["liger", "reuse"] == found["liger", "separate"]
    assert chosen["liger", "reuse"] == chosen["liger", "separate"]
    assert found["liger", "reuse"] == pytest.approx(found["torch", "reuse"], rel=1e-4)
    assert found["liger", "reuse"] != found["torch", "reuse"]  # they were in use


def test_weights_keep_their_names(tmp_path, liger):
    model = tiny_model(tmp_path / "model")
    names = []
    for which in ("torch", "liger"):
        engine = TorchEngine(config(model, tmp_path, which), load_config(model, None))
        names.append([name for name, _ in engine.model.lm.named_parameters()])
    assert names[0] == names[1]


def test_an_architecture_that_liger_does_not_know_is_refused(tmp_path, liger):
    model = tiny_model(tmp_path / "model", "gpt2")
    with pytest.raises(ValueError, match="Liger has no kernels for gpt2: set"):
        run_config(config(model, tmp_path / "run", "liger"))


def test_without_a_gpu_or_the_package_one_line_says_so(monkeypatch):
    monkeypatch.setattr(kernels, "is_available", lambda: False)
    with pytest.raises(ValueError, match="need a GPU, PyTorch sees none: set"):
        use_liger(None)
    monkeypatch.setattr(kernels, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ValueError, match=r"pip install 'slap_ds\[liger\]', or set") as told:
        use_liger(None)
    assert "\n" not in str(told.value)
