"""Mixtures of experts: how much of a model a token meets, and the loss that balances its routers.

The balance loss is that of the Switch Transformer (arXiv 2101.03961, eq. 4-6) as transformers
pools it over layers, of each sample by itself: whatever row a sample lies in, on whatever rank,
it is the same.

    f, P    (E,) share of a sample's tokens and layers sent to each expert; its mean probability
    balance = E * sum(f * P)

It enters where the routers are: their backward adds its gradient, which the loss alone would not
bring. So it is the same whether a block was checkpointed, recomputed or replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from slap_ds.compat import routers_of, whole_size
from slap_ds.data.packing import PackedRow

Mode = Literal["score", "train", "replay"]
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_CHOSEN = "num_experts_per_tok"


def active_parameters(lm: Any) -> int:
    """The parameters that a token meets: of a mixture's experts, those that are chosen for it.

    The partitioned ones of ZeRO-3 count at full size, shared ones once.
    """
    text = lm.config.get_text_config()
    experts = next((n for name in _EXPERTS if (n := getattr(text, name, None))), 0)
    chosen = getattr(text, _CHOSEN, None) or experts
    of_experts = {
        id(p)
        for name, module in lm.named_modules()
        if name.rpartition(".")[2] == "experts"
        for p in module.parameters()
    }
    sizes = [(id(p) in of_experts, whole_size(p)) for p in lm.parameters()]
    routed = sum(size for routed, size in sizes if routed)
    idle = routed * (experts - chosen) // experts if experts else 0
    return sum(size for _, size in sizes) - idle


@dataclass
class _Pass:
    """One row on its way through the model."""

    row: PackedRow
    mode: Mode
    # layer -> (2, n, E): each sample's tokens sent to each expert, the sum of their probabilities
    seen: dict[int, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None  # gradient of what is minimised with respect to the row's loss


class RouterBalance:
    """Adds the gradient of `coefficient` times the samples' balance losses to a training loss.

    A sample's balance loss weighs as much as the mean of its token losses does.
    """

    def __init__(
        self, routers: Sequence[tuple[nn.Module, int]], chosen: int, coefficient: float
    ) -> None:
        self._chosen, self._coefficient = chosen, coefficient
        self._layers = len(routers)
        self._pass: _Pass | None = None
        self._scored: dict[int, Tensor] = {}  # position -> (2, E), `seen` summed over layers
        self._trained: list[Tensor] = []  # of each row, its samples' balance losses as they weigh
        for layer, (router, index) in enumerate(routers):
            router.register_forward_hook(partial(self._routed, layer, index))

    @classmethod
    def of(cls, lm: Any) -> RouterBalance | None:
        """The balance loss that the model's config asks for; None if it asks for none.

        Raises:
            ValueError: it asks for one, and where or how strong is not known here.
        """
        text = lm.config.get_text_config()
        coefficient = getattr(text, "router_aux_loss_coef", None)
        if not getattr(text, "output_router_logits", False) or coefficient == 0:
            return None
        routers, chosen = routers_of(lm), getattr(text, _CHOSEN, None)
        if not routers or coefficient is None or chosen is None:
            raise ValueError(
                f"output_router_logits is set, and {type(lm).__name__} does not say how its "
                f"routers' balance loss is made: set it to false in the model's config"
            )
        return cls(routers, chosen, coefficient)

    def enter(self, row: PackedRow, mode: Mode | None) -> None:
        """Announce the row whose forward comes next; None: it ends in no gradient."""
        self._pass = _Pass(row, mode) if mode and row.where else None
        if self._pass and mode == "replay":  # its routers run in the backward alone, last first
            self._pass.seen[-1] = torch.stack([self._scored[i] for i in row.where], 1)

    def leave(self, result: Any) -> None:
        """The row's forward is over; of a trained row `result` is the loss."""
        now = self._pass
        if now is None:
            return
        seen = torch.stack([*now.seen.values()]).sum(0)
        if now.mode == "score":
            self._scored |= dict(zip(now.row.where, seen.unbind(1), strict=True))
        else:
            result.register_hook(partial(setattr, now, "scale"))  # the backward begins with it
            shares = seen / (self._layers * _tokens(now.row, seen.device))[:, None]
            balance = seen.shape[2] * shares.prod(0).sum(-1)
            self._trained.append((_weights(now.row, seen.device) * balance).sum())

    def take(self) -> float:
        """The balance losses of the samples trained since the last call, without the coefficient,
        summed: each times the weights of its trained tokens."""
        found, self._trained = self._trained, []
        return float(torch.stack(found).double().sum()) if found else 0.0

    def _routed(self, layer: int, index: int, router: nn.Module, given: Any, out: Any) -> Any:
        """Hook: note where tokens go; where a gradient will come by, let it take ours along."""
        now = self._pass
        if now is None:
            return out
        parts = list(out) if isinstance(out, tuple) else [out]
        logits = parts[index].flatten(0, -2)
        if now.mode != "replay":
            best = logits.detach().topk(self._chosen).indices
            p = logits.detach().float().softmax(-1)
            each = torch.stack([torch.zeros_like(p).scatter_(1, best, 1.0), p])
            seen = p.new_zeros(2, len(now.row.where), p.shape[1])
            now.seen[layer] = seen.index_add_(1, now.row.sample, each)
        if not logits.requires_grad:
            return out
        # Which of them the block goes on with is its own affair.
        carried = [i for i, part in enumerate(parts) if part.requires_grad]
        joined = _Joined.apply(  # type: ignore[no-untyped-call]
            partial(self._gradient, now), carried.index(index), *(parts[i] for i in carried)
        )
        for i, part in zip(carried, joined, strict=True):
            parts[i] = part
        return tuple(parts) if isinstance(out, tuple) else parts[0]

    def _gradient(self, now: _Pass, logits: Tensor) -> Tensor:
        """Of the row's balance losses, as they enter what is minimised, by one layer's logits."""
        assert now.scale is not None, "a router's backward came before that of the loss"
        row, experts = now.row, logits.shape[-1]
        tokens = _tokens(row, logits.device)
        weight = self._coefficient * now.scale * _weights(row, logits.device)
        sent = torch.stack([*now.seen.values()]).sum(0)[0]  # (n, E)
        factor = (weight * experts / (self._layers * tokens) ** 2)[:, None] * sent
        p, pulled = logits.flatten(0, -2).float().softmax(-1), factor[row.sample]
        return (p * (pulled - (p * pulled).sum(-1, keepdim=True))).view_as(logits)


def _tokens(row: PackedRow, device: torch.device) -> Tensor:
    """(n,) tokens of each sample."""
    return torch.tensor(row.lengths, device=device)


def _weights(row: PackedRow, device: torch.device) -> Tensor:
    """(n,) float32: of each sample, its weight times its trained tokens."""
    trained = np.bincount(row.response_sample, minlength=len(row.where))
    return row.weights.to(device) * torch.from_numpy(trained).to(device)


class _Joined(torch.autograd.Function):
    """The parts as they are; on the way back `gradient(logits)` joins that of the logits."""

    @staticmethod
    def forward(ctx: Any, gradient: Any, index: int, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.gradient, ctx.index = gradient, index
        ctx.save_for_backward(parts[index])
        return tuple(part.clone() for part in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (logits,) = ctx.saved_tensors
        ours = ctx.gradient(logits).to(logits.dtype)
        return None, None, *(g + ours if i == ctx.index else g for i, g in enumerate(grads))
