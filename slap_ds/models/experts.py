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
    sent: dict[int, Tensor] = field(default_factory=dict)  # layer -> (n, E) tokens to each expert
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
        self._scored: dict[int, Tensor] = {}  # position -> (E,) its tokens sent, over all layers
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
            self._pass.sent[-1] = torch.stack([self._scored[i] for i in row.where])

    def leave(self, result: Any) -> None:
        """The row's forward is over; of a trained row `result` is the loss."""
        now = self._pass
        if now and now.mode == "score":
            sent = torch.stack([*now.sent.values()]).sum(0)
            self._scored |= dict(zip(now.row.where, sent, strict=True))
        elif now:  # the backward begins with the loss
            result.register_hook(partial(setattr, now, "scale"))

    def _routed(self, layer: int, index: int, router: nn.Module, given: Any, out: Any) -> Any:
        """Hook: note where tokens go; where a gradient will come by, let it take ours along."""
        now = self._pass
        if now is None:
            return out
        parts = list(out) if isinstance(out, tuple) else [out]
        logits = parts[index].flatten(0, -2)
        if now.mode != "replay":
            best = logits.detach().topk(self._chosen).indices
            where = (now.row.sample[:, None] * logits.shape[1] + best).flatten()
            sent = logits.new_zeros(len(now.row.where) * logits.shape[1], dtype=torch.float32)
            sent.index_add_(0, where, torch.ones_like(where, dtype=torch.float32))
            now.sent[layer] = sent.view(-1, logits.shape[1])
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
        tokens = torch.tensor(row.lengths, device=logits.device)
        trained = np.bincount(row.response_sample, minlength=len(row.where))
        weight = self._coefficient * now.scale * row.weights * torch.tensor(trained).to(tokens)
        sent = torch.stack([*now.sent.values()]).sum(0)  # (n, E)
        factor = (weight * experts / (self._layers * tokens) ** 2)[:, None] * sent
        p, pulled = logits.flatten(0, -2).float().softmax(-1), factor[row.sample]
        return (p * (pulled - (p * pulled).sum(-1, keepdim=True))).view_as(logits)


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
