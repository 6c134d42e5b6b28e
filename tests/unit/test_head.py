"""The head's closed forms against float64 double backward, chunking against whole logits."""

import pytest
import torch

from slap_ds.scoring import WeightedTokenLoss, score_head


def make(dtype=torch.float64, tokens=23, width=12, vocab=37, samples=4, bias=False):
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(tokens, width, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64).to(dtype)
    b = torch.randn(vocab, generator=g, dtype=torch.float64).to(dtype) if bias else None
    sample = torch.arange(tokens) * samples // tokens
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    targets[::3] = -100
    return hidden, weight, b, targets, sample


def token_loss(h, y, weight, bias):
    logits = h @ weight.t() + (0 if bias is None else bias)
    return torch.nn.functional.cross_entropy(logits[None], y[None])


def brute_force(hidden, weight, bias, targets, sample, samples):
    """Loss, gradient and Hessian diagonal by autograd, token by token, in float64."""
    loss = torch.zeros(samples, dtype=torch.float64)
    gradient = torch.zeros(samples, hidden.shape[1], dtype=torch.float64)
    diagonal = torch.zeros(hidden.shape[1], dtype=torch.float64)
    w = weight.double()
    b = None if bias is None else bias.double()
    for h, y, s in zip(hidden.double(), targets, sample, strict=True):
        if y < 0:
            continue
        loss[s] += token_loss(h, y, w, b)
        gradient[s] += torch.autograd.functional.jacobian(lambda x: token_loss(x, y, w, b), h)
        hessian = torch.autograd.functional.hessian(lambda x: token_loss(x, y, w, b), h)
        diagonal += hessian.diagonal()
    return loss, gradient, diagonal


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_scores_equal_double_backward(dtype, bound, bias):
    data = make(dtype, bias=bias)
    out = score_head(*data, 4, gradient=True, diagonal=True, chunk_tokens=5)
    loss, gradient, diagonal = brute_force(*data, 4)
    for found, expected in [
        (out.loss, loss),
        (out.gradient, gradient),
        (out.diagonal, diagonal),
    ]:
        assert found is not None
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error <= bound
    counted = [int(((data[4] == s) & (data[3] >= 0)).sum()) for s in range(4)]
    assert out.tokens.tolist() == counted


def test_the_chunk_size_changes_nothing_but_rounding():
    data = make()
    whole = score_head(*data, 4, gradient=True, diagonal=True, chunk_tokens=1000)
    for chunk in (1, 2, 7):
        parts = score_head(*data, 4, gradient=True, diagonal=True, chunk_tokens=chunk)
        torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts.gradient, whole.gradient, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(parts.diagonal, whole.diagonal, rtol=1e-10, atol=1e-12)


def test_a_sample_without_response_tokens_scores_zero_over_zero():
    hidden, weight, bias, targets, sample = make()
    targets[sample == 2] = -100
    out = score_head(
        hidden, weight, bias, targets, sample, 4, gradient=True, diagonal=True, chunk_tokens=5
    )
    assert out.tokens[2] == 0
    assert out.loss[2] == 0
    assert (out.loss / out.tokens).isnan().tolist() == [False, False, True, False]


def test_a_broken_sample_stays_out_of_the_shared_diagonal():
    hidden, weight, bias, targets, sample = make()
    keep = sample != 1
    clean = score_head(
        hidden[keep], weight, bias, targets[keep], sample[keep], 4,
        gradient=True, diagonal=True, chunk_tokens=5,
    )  # fmt: skip
    hidden[sample == 1] = float("nan")
    out = score_head(
        hidden, weight, bias, targets, sample, 4, gradient=True, diagonal=True, chunk_tokens=5
    )
    assert out.loss.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(out.diagonal, clean.diagonal)


@pytest.mark.parametrize("bias", [False, True])
def test_training_loss_and_gradients_equal_autograd(bias):
    hidden, weight, b, targets, sample = make(bias=bias)
    leaves = [x.requires_grad_() for x in (hidden, weight, b) if x is not None]
    token_weight = torch.linspace(0.1, 2, 4, dtype=torch.float64)[sample]
    loss = WeightedTokenLoss.apply(hidden, weight, b, targets, token_weight, 4)
    (3 * loss).backward()
    found = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    logits = hidden @ weight.t() + (0 if b is None else b)
    per_token = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=-100, reduction="none"
    )
    expected = (per_token * token_weight).sum()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for grad, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-10, atol=1e-12)


def test_a_row_without_targets_gives_zero_gradients():
    hidden, weight, _, targets, _ = make()
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = WeightedTokenLoss.apply(
        hidden, weight, None, torch.full_like(targets, -100), torch.zeros(len(targets)), 4
    )
    loss.backward()
    assert loss == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_bfloat16_accumulates_in_float32():
    data = make(torch.bfloat16, tokens=200, vocab=300)
    out = score_head(*data, 4, gradient=True, diagonal=True, chunk_tokens=16)
    assert out.loss.dtype == torch.float32
    loss, gradient, diagonal = brute_force(*data, 4)
    assert ((out.loss - loss).abs() / loss).max() < 0.01
    assert (out.gradient - gradient).norm() / gradient.norm() < 0.02
    assert (out.diagonal - diagonal).norm() / diagonal.norm() < 0.02
