"""A model's decoder blocks, and a boundary around each of them that is ours.

    find_blocks(lm)       the blocks, by the model's structure and its number of layers
    own(block, boundary)  from now on its calls go through `boundary`, on any transformers

A block keeps its name, its weights' names and its class as a base. Only its class is a subclass of
that made at run time, whose `__call__` asks the boundary first. A call that the boundary answers
itself meets no module hook: where a block's output is known, ZeRO-3 gathers nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Run = Callable[..., Any]
Args = tuple[Any, ...]
Named = dict[str, Any]


class Boundary(Protocol):
    """What is asked at a block's edge."""

    def call(self, block: nn.Module, run: Run, args: Args, named: Named) -> Any:
        """The block's output; `run(*args, **named)` computes it, module hooks included."""

    def compute(self, block: nn.Module, run: Run, args: Args, named: Named) -> Any:
        """The same inside the module hooks, where the block's weights are whole."""


class Checkpointing:
    """Activation checkpointing: of a block that is trained, only the input is kept."""

    def call(self, block: nn.Module, run: Run, args: Args, named: Named) -> Any:
        """As it is."""
        return run(*args, **named)

    def compute(self, block: nn.Module, run: Run, args: Args, named: Named) -> Any:
        """Recomputed in backward, inside the module hooks: ZeRO-3 gathers the block's weights once
        for its forward and once for recompute and gradient together."""
        if not (block.training and torch.is_grad_enabled()):
            return run(*args, **named)
        return checkpoint(run, *args, use_reentrant=False, **named)


class _Owned:
    """Comes before a block's own class in the subclass made of both."""

    slap_boundary: Boundary | None = None  # a fresh block of this class has none

    def __init_subclass__(cls) -> None:
        """Ends here: transformers 5.24 would wrap `forward` once more for its own checkpointing."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        run = super().__call__  # type: ignore[misc]
        if self.slap_boundary is None:
            return run(*args, **named)
        return self.slap_boundary.call(cast(nn.Module, self), run, args, named)

    def forward(self, *args: Any, **named: Any) -> Any:
        run = super().forward  # type: ignore[misc]
        if self.slap_boundary is None:
            return run(*args, **named)
        return self.slap_boundary.compute(cast(nn.Module, self), run, args, named)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as a block of its own class, without a boundary."""
        state = {name: value for name, value in vars(self).items() if name != "slap_boundary"}
        return _empty, (type(self).__mro__[2],), state


def _empty(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def own(block: nn.Module, boundary: Boundary) -> None:
    """Let `boundary` decide what a call of `block` does; a later one replaces it."""
    if not isinstance(block, _Owned):
        block.__class__ = _owned_class(type(block))  # type: ignore[arg-type]
    block.slap_boundary = boundary  # type: ignore[assignment]


@functools.cache
def _owned_class(cls: type[nn.Module]) -> type[nn.Module]:
    """One for all blocks of a class, under its name: messages and files keep theirs."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_Owned, cls), names)


def find_blocks(lm: Any) -> list[nn.Module]:
    """The decoder blocks: the one outermost list of as many modules as the model has layers.

    Raises:
        ValueError: there is none, or more than one.
    """
    config = getattr(lm, "config", None)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) if config else None
    found: list[nn.ModuleList] = []
    for module in lm.modules():  # outer ones first
        inside = any(module is part for blocks in found for part in blocks.modules())
        if isinstance(module, nn.ModuleList) and len(module) == layers and not inside:
            found.append(module)
    if len(found) != 1:
        raise ValueError(
            f"{type(lm).__name__} has {len(found)} lists of {layers} blocks, expected one"
        )
    return list(found[0])


def hidden_of(output: Any) -> Tensor:
    """A block's hidden states; some return them in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
