"""A model that another loop owns, wraps and steps: transformers' Trainer, or a user's script.

    outer(row, mode, request)   packed rows go to our forward, whatever has been wrapped around it
    outer(input_ids=..., ...)   everything else to the model's own

The call goes through the outermost module, so that DistributedDataParallel and ZeRO-3 see an
ordinary forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from slap_ds.compat import gathered_along, second_order, stay_gathered
from slap_ds.data.packing import PackedRow
from slap_ds.engine.base import ScoringEngine
from slap_ds.models.blocks import find_blocks
from slap_ds.models.causal import PackedCausalLM
from slap_ds.models.reuse import BlockInputs
from slap_ds.scoring import ScoreRequest, Scores


class HostedEngine(ScoringEngine):
    """Scores packed rows with a causal language model of transformers, or of peft around one.

    `close()` leaves the model as it was.

    Args:
        model: what the loop calls and wraps.
        chunk_tokens: tokens whose logits are held at once.
        block_inputs: the boundary of its blocks, where the scoring forward is to be reused.

    Raises:
        ValueError: the model has no plain linear head, or its adapter is not one of weights.
    """

    def __init__(
        self,
        model: Any,
        *,
        chunk_tokens: int,
        device: torch.device,
        block_inputs: BlockInputs | None = None,
    ) -> None:
        self.model = PackedCausalLM(language_model(model), chunk_tokens, block_inputs)
        self.device = device
        self.wrapped = model  # or what a library has made of it
        self._outer, self._own_forward = model, vars(model).get("forward")
        model.forward = _routed(model.forward, self.model)
        self._zero3: Any = None  # DeepSpeed's engine, where it partitions the weights
        self._replays: Any = None
        self._rows = 0  # of a step, still to be trained on what scoring kept

    def close(self) -> None:
        """Give the model its own forward back."""
        self.model.give_head_back()
        if self._own_forward is not None:
            self._outer.forward = self._own_forward
        else:
            vars(self._outer).pop("forward", None)

    def partition(self) -> None:
        """Before DeepSpeed's ZeRO-3 takes the model over: one gather of weights a block, and none
        is let go of between its recompute and its gradient."""
        import deepspeed

        if self.model.block_inputs is None:
            return
        kinds = {type(block) for block in find_blocks(self.model.lm)}
        deepspeed.utils.set_z3_leaf_modules(self.model.lm, list(kinds))
        self.model.block_inputs.held = stay_gathered

    def wrap(self, wrapped: Any, zero3: bool) -> None:
        """From now on rows go through `wrapped`, which with `zero3` is DeepSpeed's engine."""
        self.wrapped = wrapped
        if zero3 and self._zero3 is not wrapped:
            self._zero3 = wrapped
            self._replays = second_order(wrapped.optimizer)
            # ZeRO-3 prefetches along the order of modules that it saw first; a training row's
            # begins as a scored row's does, and so serves both. The row adds zeros to gradients.
            wrapped.set_gradient_accumulation_boundary(False)
            loss = self._forward(PackedRow.empty().to(self.device), "train", None)
            wrapped.backward(loss, scale_wrt_gas=False)

    def score(self, rows: Sequence[PackedRow], request: ScoreRequest, keep: bool = False) -> Scores:
        self.forget_rows()
        return super().score(rows, request, keep)

    def start_replay(self, rows: Sequence[PackedRow]) -> None:
        """The rows that follow, in this order, are trained on what the last scoring kept."""
        self._inputs().start_replay(rows)
        self._rows = len(rows)

    def train_row(
        self, row: PackedRow, factor: float, backward: Callable[[Tensor], None]
    ) -> Tensor:
        """Forward and backward of one row.

        Args:
            factor: of the row's weighted sum of token losses. backward: runs it, as the loop does.

        Returns: the sum times the factor, detached.
        """
        with self._order_of_modules():
            loss: Tensor = self._forward(row.to(self.device), "train", None) * factor
            backward(loss)
        if self._rows:
            self._rows -= 1
            if not self._rows:
                self._inputs().stop()
        return loss.detach()

    def forget_rows(self) -> None:
        """Rows that somebody began to replay and left are not trained any more."""
        if self._rows:
            self._rows = 0
            self._inputs().stop()

    def _order_of_modules(self) -> AbstractContextManager[None]:
        """Replayed rows skip the forward of every block: ZeRO-3 prefetches them along an order of
        their own."""
        if not self._rows or self._replays is None:
            return nullcontext()
        return gathered_along(self._zero3.optimizer, self._replays)

    def _whole(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        if self._zero3 is None:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        gathered: AbstractContextManager[Any] = GatheredParameters(parameters)
        return gathered

    def _forward(self, row: PackedRow, mode: str, request: ScoreRequest | None) -> Any:
        if mode == "own":  # the model's own forward, by the way its loop takes
            output = self.wrapped(**self.model.arguments(row))
            return self.model.loss_of_logits(output.logits, row)
        return self.wrapped(row, mode, request)


def language_model(model: Any) -> Any:
    """The causal language model in a model of transformers or peft.

    Raises:
        ValueError: peft's adapter puts tokens before the input, so that samples would not be as
            long as they are.
    """
    adapter = getattr(model, "active_peft_config", None)
    if adapter is None:  # transformers' own, with adapters of its own or without
        return model
    if adapter.is_prompt_learning:
        raise ValueError(
            f"the model's {adapter.peft_type.value} adapter puts tokens of its own before each "
            "sample, which packed rows have no room for: use LoRA, DoRA or full fine-tuning"
        )
    return model.get_base_model()


def _routed(forward: Any, packed: PackedCausalLM) -> Any:
    """`forward` under its own signature, but packed rows go to `packed`."""

    @functools.wraps(forward)
    def route(*args: Any, **named: Any) -> Any:
        if args and isinstance(args[0], PackedRow):
            return packed.forward(*args, **named)
        return forward(*args, **named)

    return route
