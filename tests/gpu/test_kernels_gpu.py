"""Kernels of other libraries on a GPU, where they are installed: against PyTorch's, in float32."""

import shutil

import pytest
import torch

from slap_ds.models.kernels import use_liger
from slap_ds.models.load import load_config, load_model
from tests.recipes import tiny_model

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
