"""Functions of final hidden states that autograd goes through, never holding more than a chunk.

WeightedTokenLoss    the training loss, with gradients made in its forward
HeadGradient         a token's gradient, whose own backward is the Hessian-vector product
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slap_ds.scoring.response import Response
from slap_ds.scoring.softmax import Chunk, Head


class WeightedTokenLoss(torch.autograd.Function):
    """sum_t w_t * cross_entropy(head(h_t), y_t), with gradients made in the forward.

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
        cap: float | None = None,
        response: Response | None = None,
    ) -> Tensor:
        head = Head(weight, bias, cap)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=head.acc) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=head.acc) if need_bias and bias is not None else None
        total = torch.zeros((), dtype=head.acc, device=hidden.device)
        known = response or Response.of(targets, torch.zeros_like(targets))
        for t, place, _ in known.pieces(chunk_tokens, targets.device):
            # Not masked: a gradient that is not finite must be seen.
            chunk = Chunk(head, hidden[t], targets[t], t, place, mask=False)
            w = token_weight[t].to(head.acc)
            total += (chunk.loss * w).sum()
            p = chunk.dense.mul_((w * chunk.inv)[:, None])
            if d_bias is not None:
                d_bias += p.sum(0)
            d_logits = p.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[t] = d_logits @ weight
            if d_weight is not None:
                if d_weight.dtype == weight.dtype:
                    d_weight.addmm_(d_logits.t(), chunk.h)
                else:
                    d_weight += d_logits.t() @ chunk.h
            del chunk
        ctx.grads = (d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = upstream
        # In float32: rounded to bfloat16, the scale alone would be off by up to 0.4 %.
        grads = [
            None if g is None else g.to(scale.dtype).mul_(scale).to(dtype)
            for g, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        ctx.grads = None
        return (*grads, None, None, None, None, None)


class HeadGradient(torch.autograd.Function):
    """(T, E) -> (T, E): delta_t, zero where nothing is trained; its own backward is v -> H_t v.

    A double backward through blocks and head so never holds the logits of more than a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        chunk_tokens: int,
        response: Response | None = None,
    ) -> Tensor:
        ctx.save_for_backward(hidden)
        response = response or Response.of(targets, torch.zeros_like(targets))
        ctx.rest = (head, targets, chunk_tokens, response)
        return _by_token(hidden, lambda chunk, t: chunk.delta, *ctx.rest)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (v,) = upstream
        (hidden,) = ctx.saved_tensors
        product = _by_token(hidden, lambda chunk, t: chunk.product(v[t]), *ctx.rest)
        return (product, None, None, None, None)


def _by_token(
    hidden: Tensor,
    value: Callable[[Chunk, Tensor], Tensor],
    head: Head,
    targets: Tensor,
    chunk_tokens: int,
    response: Response,
) -> Tensor:
    out = torch.zeros_like(hidden)
    for t, place, _ in response.pieces(chunk_tokens, targets.device):
        chunk = Chunk(head, hidden[t], targets[t], t, place)
        out[t] = value(chunk, t).to(out.dtype)
        del chunk
    return out
