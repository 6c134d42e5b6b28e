"""The head in closed form: loss, gradient and curvature of response tokens, chunk by chunk.

    h (T, E), W (V, E) -> logits of a chunk -> loss, delta = W^T (p - onehot(y)), diag(H)

Everything here is exact for a linear-softmax head (docs/method.md). Logits exist for one chunk of
tokens at a time, so the extra memory is `chunk_tokens * V` values, whatever T is.

Shape letters: T tokens, n samples of the row, E model width, V vocabulary, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class HeadScores(NamedTuple):
    """Sums over a row's response tokens; the scorer divides by `tokens`.

    A tuple, because DeepSpeed's hooks look for tensors in the outputs of modules.
    """

    loss: Tensor  # (n,) nats, summed over the sample's response tokens
    tokens: Tensor  # (n,) int64, response tokens
    gradient: Tensor | None  # (n, E): sum over the sample's tokens of delta_t
    diagonal: Tensor | None  # (E,): sum over all tokens of diag(H_t), samples of finite loss only


def score_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    sample: Tensor,
    samples: int,
    *,
    gradient: bool,
    diagonal: bool,
    chunk_tokens: int,
) -> HeadScores:
    """Loss, gradient with respect to the hidden state, and its Hessian's diagonal, per sample.

    With p_t = softmax(W h_t + b):
        delta_t = W^T p_t - W[y_t]
        diag(H_t) = (W * W)^T p_t - (W^T p_t)^2, and W^T p_t = delta_t + W[y_t]

    The first term of the diagonal is linear in p_t, so p_t is summed over tokens first and
    `W * W` meets one vector. Sums are float32 (float64 for float64 inputs).

    Args:
        hidden: (T, E) final hidden states. weight: (V, E). bias: (V,) or None.
        targets: (T,) int64, the next token or a negative number where nothing is trained.
        sample: (T,) int64 in [0, samples).
    """
    acc = torch.promote_types(weight.dtype, torch.float32)
    device = hidden.device
    loss = torch.zeros(samples, dtype=acc, device=device)
    tokens = torch.zeros(samples, dtype=torch.int64, device=device)
    want_delta = gradient or diagonal
    width = weight.shape[1]
    grad = torch.zeros(samples, width, dtype=acc, device=device) if gradient else None
    p_sum = torch.zeros(weight.shape[0], dtype=acc, device=device) if diagonal else None
    square = torch.zeros(width, dtype=acc, device=device) if diagonal else None
    for h, y, s in _chunks(hidden, targets, sample, chunk_tokens):
        logits = _logits(h, weight, bias, acc)
        lse = logits.logsumexp(-1, keepdim=True)
        token_loss = (lse - logits.gather(1, y[:, None]))[:, 0]
        loss.index_add_(0, s, token_loss)
        tokens.index_add_(0, s, torch.ones_like(s))
        if not want_delta:
            continue
        p = logits.sub_(lse).exp_()
        if p_sum is not None:
            # A sample that blew up must not poison the average that all samples share.
            finite = torch.isfinite(token_loss)
            p_sum += torch.where(finite[:, None], p, 0).sum(0) if not finite.all() else p.sum(0)
        rows = torch.arange(len(y), device=device)
        p[rows, y] -= 1
        delta = (p.to(weight.dtype) @ weight).to(acc)
        if grad is not None:
            grad.index_add_(0, s, delta)
        if square is not None:
            mean = delta + weight[y].to(acc)
            mean = torch.where(finite[:, None], mean, 0)
            square += mean.square().sum(0)
    diag = None
    if p_sum is not None and square is not None:
        diag = _square_transposed(weight, p_sum) - square
    return HeadScores(loss, tokens, grad, diag)


class WeightedTokenLoss(torch.autograd.Function):
    """sum_t w_t * cross_entropy(W h_t + b, y_t), with gradients made in the forward.

    The logits of a chunk are at hand once; making `d loss / d hidden` and `d loss / d W` from them
    there saves the backward a second (T, V) product and never holds more than a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        token_weight: Tensor,
        chunk_tokens: int,
    ) -> Tensor:
        acc = torch.promote_types(weight.dtype, torch.float32)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=acc) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=acc) if need_bias and bias is not None else None
        total = torch.zeros((), dtype=acc, device=hidden.device)
        index = torch.arange(len(targets), device=hidden.device)
        for h, y, t in _chunks(hidden, targets, index, chunk_tokens):
            logits = _logits(h, weight, bias, acc)
            lse = logits.logsumexp(-1, keepdim=True)
            w = token_weight[t].to(acc)
            total += ((lse - logits.gather(1, y[:, None]))[:, 0] * w).sum()
            p = logits.sub_(lse).exp_()
            p[torch.arange(len(y), device=y.device), y] -= 1
            p *= w[:, None]
            if d_bias is not None:
                d_bias += p.sum(0)
            d_logits = p.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[t] = d_logits @ weight
            if d_weight is not None:
                if d_weight.dtype == weight.dtype:
                    d_weight.addmm_(d_logits.t(), h)
                else:
                    d_weight += d_logits.t() @ h
        ctx.grads = (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = upstream
        grads = [None if g is None else g.mul_(scale.to(g.dtype)) for g in ctx.grads]
        ctx.grads = None
        return (*grads, None, None, None)


def _chunks(
    hidden: Tensor, targets: Tensor, extra: Tensor, chunk_tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Response tokens only, `chunk_tokens` at a time: (c, E), (c,), (c,)."""
    response = (targets >= 0).nonzero()[:, 0]
    for t in response.split(chunk_tokens):
        if len(t):
            yield hidden[t], targets[t], extra[t]


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, acc: torch.dtype) -> Tensor:
    # Not F.linear: under ZeRO-3 DeepSpeed replaces it by a version of its own.
    logits = (h @ weight.t()).to(acc)
    return logits if bias is None else logits + bias.to(acc)


def _square_transposed(weight: Tensor, p: Tensor) -> Tensor:
    """(W * W)^T p without holding W * W: (V, E), (V,) -> (E,)."""
    out = torch.zeros(weight.shape[1], dtype=p.dtype, device=p.device)
    for w, q in zip(weight.split(8192), p.split(8192), strict=True):
        out += q @ w.to(p.dtype).square()
    return out
