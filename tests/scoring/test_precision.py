"""What bfloat16 models must not round: logits, and the factor in front of the loss."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from slap_ds.scoring import Head, WeightedTokenLoss

T, E, V = 24, 64, 300


def case():
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(T, E, generator=g).bfloat16()
    weight = (torch.randn(V, E, generator=g) / 8).bfloat16()
    targets = torch.randint(0, V, (T,), generator=g)
    return hidden, weight, targets


def test_logits_are_summed_and_kept_in_float32():
    hidden, weight, _ = case()
    logits = Head(weight).logits(hidden)
    exact = hidden.double() @ weight.double().t()
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-5
    assert (logits.bfloat16() - exact).abs().max() > 1e-3  # what rounding them would cost


@pytest.mark.parametrize("width", [torch.float32, torch.bfloat16])
def test_logits_on_a_gpu_are_float32_too(width):
    """Without values and without a GPU: the dtype that its product asks for."""
    with FakeTensorMode():
        hidden = torch.empty(T, E, dtype=width, device="cuda")
        weight = torch.empty(V, E, dtype=torch.bfloat16, device="cuda")
        logits = Head(weight).logits(hidden)
        assert (logits.dtype, logits.device.type) == (torch.float32, "cuda")
        assert logits.shape == (T, V)


# The world over the weight of all tokens; bfloat16 has no number within 0.28 % of these.
@pytest.mark.parametrize("factor", [1.3398, 1.3398 / 1024])
def test_the_factor_of_the_loss_is_not_rounded(factor):
    """Gradients for `factor` are those for 1, times `factor`, each rounded once at the end."""
    found = []
    for scale in (1.0, factor):
        hidden, weight, targets = case()
        hidden.requires_grad_()
        weight.requires_grad_()
        ones = torch.ones(T)
        loss = WeightedTokenLoss.apply(hidden, weight, None, targets, ones, 10)
        assert loss.dtype == torch.float32
        (loss * scale).backward()
        found.append((hidden.grad.double(), weight.grad.double()))
    for plain, scaled in zip(*found, strict=True):
        assert float(scaled.norm() / plain.norm()) == pytest.approx(factor, rel=5e-4)
