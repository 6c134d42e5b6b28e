"""The last n blocks once more, with a graph: what the head alone cannot tell.

    Tail(lm, n)           copies of their weights, taken where they are whole
    recorded(lm, n)       catches the input of the first of them in the scoring forward
    score_tail(...)       their curvature (hutchinson_blocks)

Under ZeRO-3 a double backward cannot go through the engine: the weights are freed after each block,
and the second graph still needs them. So the blocks run again as plain functions of their input,
on copies, behind no hooks. The copies hold n blocks and the final norm in float32; the head's
weight is used where it is whole, and never copied.

What is differentiated is a shift b (E,) added to the input of the first of the n blocks at all
tokens. A sample's gradient with respect to it is the sum of its tokens' gradients there; for n = 0
it would be the shift of the final hidden states, whose gradient is head_input and whose diagonal
is exact_head. The residual stream keeps its coordinates through the blocks.

Shape letters: T tokens, n samples of a row, E model width, m probes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from slap_ds.compat import attention_of, is_deepspeed_name
from slap_ds.device import to_device
from slap_ds.scoring.head import HeadScores
from slap_ds.scoring.probes import signs
from slap_ds.scoring.request import ScoreRequest
from slap_ds.scoring.response import Response
from slap_ds.scoring.softmax import Head
from slap_ds.scoring.token_loss import HeadGradient

# Fused attention kernels have no second derivative; of these the plain path is taken.
_ATTENTION = ("packed", "sdpa", "eager")


class Tail:
    """The last `blocks` blocks and the final norm of a model, as functions of plain tensors.

    Make it where their weights are whole; it copies them, in float32 at least.

    Raises:
        ValueError: the model is not built as LLaMA is, has fewer blocks, or its attention has no
            second derivative.
    """

    def __init__(self, lm: Any, blocks: int) -> None:
        self.steps: list[tuple[nn.Module, dict[str, Tensor]]] = []
        for index, layer in tail_layers(lm, blocks):
            # A fresh block without weights: the model's own carries ZeRO-3's hooks.
            with torch.device("meta"):
                bare = type(layer)(layer_config(lm), index)
            weights = _copies(layer)
            if set(weights) != set(_names(bare)):
                raise ValueError(
                    f"block {index} holds more than a plain {type(layer).__name__} (adapters?): "
                    "scoring the last blocks is not possible; use exact_head and head_input"
                )
            self.steps.append((bare.eval(), weights))
        norm = lm.base_model.norm
        self.norm = (_without_weights(norm), _copies(norm))

    def __call__(self, x: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """(1, T, E) -> (T, E) final hidden states, with second derivatives."""
        with sdpa_kernel(SDPBackend.MATH):
            for layer, weights in self.steps:
                out = torch.func.functional_call(layer, weights, (x,), dict(arguments))
                x = out[0] if isinstance(out, tuple) else out
        norm, weights = self.norm
        hidden: Tensor = torch.func.functional_call(norm, weights, (x,))
        return hidden[0]


class Recorded:
    """The input of the first of the last n blocks, as the model gave it."""

    hidden: Tensor  # (1, T, E)
    arguments: dict[str, Any]


@contextmanager
def recorded(lm: Any, blocks: int) -> Iterator[Recorded]:
    """While open, a forward of `lm` leaves what its last `blocks` blocks were called with."""
    found = Recorded()
    (_, layer), *_ = tail_layers(lm, blocks)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.arguments = dict(kwargs)
        found.hidden = args[0] if args else found.arguments.pop("hidden_states")

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def tail_layers(lm: Any, blocks: int) -> list[tuple[int, nn.Module]]:
    """(index, block) of the last `blocks` blocks.

    Raises:
        ValueError: see `Tail`.
    """
    base = lm.base_model
    layers, norm = getattr(base, "layers", None), getattr(base, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
        raise ValueError(
            f"{type(lm).__name__} has no `layers` followed by `norm`: scoring its last blocks "
            "(hutchinson_blocks) is not possible; use exact_head and head_input"
        )
    if blocks > len(layers):
        raise ValueError(f"scoring.blocks is {blocks}, the model has {len(layers)} blocks")
    attention = attention_of(layer_config(lm))
    if attention not in _ATTENTION:
        raise ValueError(
            f"model.attention is {attention!r}, which has no second derivative: scoring the last "
            f"blocks needs one of {', '.join(_ATTENTION)}"
        )
    return list(enumerate(layers))[len(layers) - blocks :]


def tail_parameters(lm: Any, blocks: int) -> list[nn.Parameter]:
    """The parameters `Tail` copies: whole where these are gathered."""
    modules = [layer for _, layer in tail_layers(lm, blocks)]
    return [p for module in (*modules, lm.base_model.norm) for p in module.parameters()]


def score_tail(
    tail: Tail,
    record: Recorded,
    head: Head,
    targets: Tensor,
    sample: Tensor,
    scores: HeadScores,
    request: ScoreRequest,
    *,
    chunk_tokens: int,
    scale: float,
    response: Response | None = None,
) -> HeadScores:
    """`scores` with the blocks' diagonal filled in."""
    response = response or Response.of(targets, sample)
    dtype = torch.promote_types(record.hidden.dtype, torch.float32)
    x = record.hidden.detach().to(dtype).requires_grad_()
    with torch.enable_grad():
        hidden = tail(x, _to(record.arguments, dtype))
        upstream = scale * HeadGradient.apply(  # type: ignore[no-untyped-call]
            scale * hidden, head, targets, chunk_tokens, response
        )
        (gradient,) = torch.autograd.grad(hidden, x, upstream, create_graph=True)
    return _diagonal(gradient, x, sample, scores, request)


def _diagonal(
    gradient: Tensor, x: Tensor, sample: Tensor, scores: HeadScores, request: ScoreRequest
) -> HeadScores:
    """hutchinson_blocks: mean_k z_k * (H z_k), (E,), with H the Hessian by the shift b.

    All tokens share a probe z (E,): H z is the sum over tokens of the gradient of
    sum_t gradient_t . z. It is summed sample by sample, so that a broken one can be left out.
    """
    n, width = len(scores.loss), x.shape[-1]
    z = signs(request.seed, request.step, "probes", width, request.probes)
    z = to_device(z, x.device, x.dtype)
    sums = torch.zeros(n, width, dtype=x.dtype, device=x.device)
    for k in range(request.probes):
        along = z[:, k].expand_as(gradient)
        (product,) = torch.autograd.grad(gradient, x, along, retain_graph=k + 1 < request.probes)
        if n:
            sums.index_put_((sample,), z[:, k] * product[0], accumulate=True)
    good = torch.isfinite(scores.loss) & torch.isfinite(sums).all(1)
    return scores._replace(
        diagonal=torch.where(good[:, None], sums, 0).sum(0) / request.probes,
        diagonal_tokens=torch.where(good, scores.tokens, 0).sum(),
    )


def layer_config(lm: Any) -> Any:
    """The config that the blocks of `lm` were built with."""
    return lm.base_model.config


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in (*module.named_parameters(), *module.named_buffers())]


def _copies(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name: _float(value.detach()).clone() if value.is_floating_point() else value.clone()
        for name, value in tensors.items()
    }


def _without_weights(norm: nn.Module) -> nn.Module:
    """A module of the same settings with nothing in it: its weights are passed in."""
    bare = type(norm).__new__(type(norm))
    nn.Module.__init__(bare)
    for key, value in vars(norm).items():
        if key not in vars(bare) and not is_deepspeed_name(key):
            setattr(bare, key, value)
    for name, parameter in norm.named_parameters():
        bare.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device="meta")))
    return bare.eval()


def _to(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in nested arguments, as `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_to(part, dtype) for part in value)
    if isinstance(value, dict):
        return {key: _to(part, dtype) for key, part in value.items()}
    return value


def _float(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
