"""Kernels of other libraries on a GPU, where they are installed: against PyTorch's, in float32."""

import shutil

import numpy as np
import pytest
import torch

from slap_ds.data.packing import Candidate, make_row
from slap_ds.engine import TorchEngine
from slap_ds.models.kernels import use_liger
from slap_ds.models.load import load_config, load_model
from slap_ds.scoring import ScoreRequest
from tests.recipes import tiny_config, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def outputs(lm, ids):
    """Logits, and the gradient of the embeddings of their squares' mean."""
    lm = lm.cuda()
    logits = lm(input_ids=ids).logits.float()
    logits.square().mean().backward()
    return logits.detach(), lm.get_input_embeddings().weight.grad.float()


def test_liger_errs_no_more_than_bfloat16_itself(tmp_path):
    pytest.importorskip("liger_kernel")
    path = tiny_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    ids = torch.arange(3, 203).cuda()[None]

    def lm(dtype):
        model_config = load_config(path, None)
        return load_model(path, model_config, dtype=dtype, attention="sdpa", seed=0)

    exact, plain = outputs(lm("float32"), ids), outputs(lm("bfloat16"), ids)
    fused = lm("bfloat16")
    use_liger(fused)
    for found, naive, truth in zip(outputs(fused, ids), plain, exact, strict=True):
        assert (found - truth).norm() <= 1.5 * (naive - truth).norm()


@pytest.mark.parametrize("number", [2, 3, 4])
def test_flash_attention_keeps_samples_apart_and_errs_no_more_than_packed(tmp_path, number):
    """Losses of three samples in one row, against float32."""
    path = tiny_model(tmp_path / "model", hidden_size=256, intermediate_size=512)

    def losses(dtype, attention):
        config = tiny_config(
            path,
            tmp_path / f"{dtype}-{attention}",
            engine={"kind": "torch"},
            model={"dtype": dtype, "attention": attention},
        )
        engine = TorchEngine(config, load_config(path, None))
        ids, trained = np.arange(3, 203), np.ones(200, dtype=bool)
        cuts = [slice(0, 7), slice(7, 90), slice(90, 200)]
        row = make_row([Candidate(i, ids[c], trained[c]) for i, c in enumerate(cuts)])
        return engine.score([row], ScoreRequest()).loss

    try:
        found = losses("bfloat16", f"flash_attention_{number}")
    except ValueError as error:
        pytest.skip(str(error))
    exact, packed = losses("float32", "packed"), losses("bfloat16", "packed")
    assert (found - exact).norm() <= 1.5 * (packed - exact).norm()


@pytest.mark.slow  # DeepSpeed compiles it with nvcc
def test_fused_adam_steps_as_torch_does():
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: DeepSpeed cannot compile FusedAdam")
    from deepspeed.ops.adam import FusedAdam

    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    torch.manual_seed(0)
    start = torch.randn(1000, 33, device="cuda")
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    kinds = zip((torch.optim.AdamW, FusedAdam), weights, strict=True)
    optimizers = [kind([weight], **settings) for kind, weight in kinds]
    for _ in range(20):
        gradient = torch.randn_like(start)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    moved, difference = (weights[0] - start).norm(), (weights[0] - weights[1]).norm()
    assert difference < 1e-5 * moved
