"""A block once more, for its gradient alone: without the last product, whose value nobody needs.

A backward needs what the operations of a forward saved. What a block computes after the last of
these is its output, and in most blocks that is the MLP's last product, a quarter of all; torch's
own checkpointing stops there. A recompute whose graph is used cannot stop, but it can leave that
one product out: the graph is the same, and so are the gradients, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Recompute:
    """Runs blocks for their gradients; learns of each, the first time, what can be left out."""

    def __init__(self) -> None:
        self._last: dict[nn.Module, nn.Linear | None] = {}

    def __call__(self, block: nn.Module, run: Callable[[], Any]) -> Any:
        """`run()`, a forward of `block`, whose result is good for a backward and nothing else."""
        if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
            return run()  # products have other dtypes than what goes into them
        if block not in self._last:
            out, self._last[block] = _watched(block, run)
            return out
        last = self._last[block]
        if last is None:
            return run()
        with _left_out(last) as saved:
            out = run()
        if saved:  # not the last one this time, as in a mixture of experts: its value was needed
            self._last[block] = None
            return run()
        return out


def _watched(block: nn.Module, run: Callable[[], Any]) -> tuple[Any, nn.Linear | None]:
    """The result of `run`, and the layer whose product nothing was saved after, if one was last."""
    saved: list[None] = []
    called: list[tuple[nn.Linear, int]] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(None)
        return x

    def note(linear: nn.Linear, args: Any, out: Any) -> None:
        called.append((linear, len(saved)))

    plain = [m for m in block.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    handles = [linear.register_forward_hook(note) for linear in plain]
    try:
        with saved_tensors_hooks(pack, lambda x: x):
            out = run()
    finally:
        for handle in handles:
            handle.remove()
    last, then = called[-1] if called else (None, 0)
    # A bias would be summed in another order.
    found = last is not None and last.bias is None and then == len(saved)
    return out, last if found else None


@contextmanager
def _left_out(linear: nn.Linear) -> Iterator[list[None]]:
    """Inside, `linear` returns zeros; the list grows with every tensor saved after them."""
    saved: list[None] = []
    begun = False

    def forward(x: Tensor) -> Tensor:
        nonlocal begun
        out: Tensor = _Product.apply(x, linear.weight)  # type: ignore[no-untyped-call]
        begun = True
        return out

    def pack(x: Tensor) -> Tensor:
        if begun:
            saved.append(None)
        return x

    linear.forward = forward  # type: ignore[method-assign, assignment]
    try:
        with saved_tensors_hooks(pack, lambda x: x):
            yield saved
    finally:
        del linear.forward


class _Product(torch.autograd.Function):
    """x @ weight.t() with its gradient, but zeros for its value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        of_x, of_weight = ctx.needs_input_grad
        return (
            (grad @ weight).view_as(x) if of_x else None,
            grad.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None,
        )
