"""Forward reuse: the scoring forward is the training forward.

    score   every block's input is kept, without a graph   (1 forward of all candidates)
    replay  blocks give back what they gave in scoring; the backward recomputes each block from
            its kept input                                 (recompute + backward of the picks)

This is activation checkpointing with selection between its forward and its backward: the block
inputs are the checkpoints, and the gradients are those of ordinary training on the picks.
A step costs N + 3M forwards instead of the N + 4M of scoring and then training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slap_ds.data.packing import PackedRow

Mode = Literal["train", "score", "replay"]


class BlockInputs:
    """The checkpointing function of a transformers model that can also record and replay.

    transformers calls it for every block, as `self(partial(forward, block, ...), hidden)`.

    Args:
        blocks: the decoder blocks in order.
        on_host: keep recorded inputs in (pinned) host memory.
    """

    def __init__(self, blocks: list[nn.Module], on_host: bool) -> None:
        self.mode: Mode = "train"
        self.on_host = on_host
        self._index = {id(block): i for i, block in enumerate(blocks)}
        self._last = len(blocks) - 1
        self._spans: dict[int, tuple[int, int, int]] = {}  # position -> row, start, end
        self._recorded: list[list[Tensor]] = []  # [boundary 0..L][scored row] -> (T, E)
        # [row to replay][boundary 0..L] -> pieces of (T, E), one unless they lie on the host
        self._cuts: list[list[list[Tensor]]] = []
        self._current: list[Tensor] = []  # the row being replayed
        self.peak_bytes = 0  # most bytes of boundaries held at once since start_scoring

    def start_scoring(self) -> None:
        """Forget the last step; the rows that follow are recorded."""
        self.mode = "score"
        self._spans, self._cuts, self._current = {}, [], []
        self._recorded = [[] for _ in range(self._last + 2)]
        self.peak_bytes = 0

    def start_replay(self, rows: Sequence[PackedRow]) -> None:
        """Keep what `rows`, made of recorded samples, need; they follow in this order.

        Boundary by boundary, so that only one of them is held twice at a time; on the host none is,
        for the host never reads them: pinned as they are, they go back in pieces.
        """
        assert self._recorded, "nothing was recorded: score before replaying"
        self.mode = "replay"
        self.peak_bytes = sum(_size(x) for scored in self._recorded for x in scored)
        self._cuts = [[] for _ in rows]
        for boundary, scored in enumerate(self._recorded):
            for cut, row in zip(self._cuts, rows, strict=True):
                cut.append(self._cut(scored, row))
            self._recorded[boundary] = []

    def stop(self) -> None:
        """Back to ordinary checkpointing; what was recorded is released."""
        self.mode = "train"
        self._spans, self._recorded, self._cuts, self._current = {}, [], [], []

    def enter(self, row: PackedRow) -> None:
        """Announce the row whose forward comes next."""
        if self.mode == "score":
            number, start = len(self._recorded[0]), 0
            for position, length in zip(row.where, row.lengths, strict=False):
                self._spans[position] = (number, start, start + length)
                start += length
        elif self.mode == "replay":
            device = row.input_ids.device
            self._current = [
                torch.cat([piece.to(device, non_blocking=True) for piece in pieces])
                if len(pieces) > 1
                else pieces[0].to(device, non_blocking=True)
                for pieces in self._cuts.pop(0)
            ]

    def __call__(self, run: Callable[..., Any], hidden: Tensor, *rest: Any) -> Any:
        block = run.args[0] if run.args else run.func.__self__  # type: ignore[attr-defined]
        i = self._index[id(block)]
        if self.mode == "train":
            return checkpoint(run, hidden, *rest, use_reentrant=False)
        if rest:  # GPT-2 gives its mask by position
            run = _bound(run, rest)
        if self.mode == "score":
            self._record(i, hidden)
            out = run(hidden)
            if i == self._last:
                self._record(i + 1, _hidden(out))
            return out
        before, after = self._current[i][None], self._current[i + 1][None]
        return _Replay.apply(hidden, before, after, run)  # type: ignore[no-untyped-call]

    def _record(self, boundary: int, hidden: Tensor) -> None:
        kept = hidden[0].detach()
        if self.on_host and kept.is_cuda:
            pinned = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
            kept = pinned.copy_(kept, non_blocking=True)
        self._recorded[boundary].append(kept)

    def _cut(self, scored: list[Tensor], row: PackedRow) -> list[Tensor]:
        """A row's tokens of one boundary, cut out of the scored rows: (T, E) in pieces."""
        if not row.where:  # an empty row has one token that trains nothing
            return [torch.zeros_like(scored[0][:1])]
        spans = [self._spans[position] for position in row.where]
        pieces = [scored[number][start:end] for number, start, end in spans]
        return pieces if self.on_host else [torch.cat(pieces)]


class _Replay(torch.autograd.Function):
    """Forward: a block's recorded output. Backward: recompute the block from its recorded input."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, block_input: Tensor, block_output: Tensor, run: Callable[..., Any]
    ) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(block_input)
        return block_output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (block_input,) = ctx.saved_tensors
        x = block_input.detach().requires_grad_(True)
        with torch.enable_grad():
            out = _hidden(ctx.run(x))
        # ZeRO-3's hooks reduce and release the block's parameters inside this backward.
        torch.autograd.backward(out, grads[0])
        ctx.run = None
        return x.grad, None, None, None


def _bound(run: Callable[..., Any], rest: tuple[Any, ...]) -> Callable[[Tensor], Any]:
    return lambda hidden: run(hidden, *rest)


def install(lm: Any, on_host: bool = False) -> BlockInputs:
    """Make a `BlockInputs` the checkpointing function of `lm`.

    Raises:
        ValueError: the model's blocks cannot be found, are not checkpointed one by one, or draw
            random numbers (dropout), so that a recomputed block would differ.
    """
    blocks = find_blocks(lm)
    dropout = sorted(
        {f"{name} = {value}" for name, value in _dropouts(lm) if isinstance(value, float | int)}
    )
    if dropout:
        raise ValueError(
            f"forward reuse needs a model without dropout, found {', '.join(dropout[:4])}: set it "
            "to 0, in the model's config or where it is named, or use step.forward: separate"
        )
    inputs = BlockInputs(blocks, on_host)
    lm._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=inputs)
    return inputs


def find_blocks(lm: Any) -> list[nn.Module]:
    """The decoder blocks, through the model's own structure: the one list of checkpointed layers.

    Raises:
        ValueError: there is none, or more than one.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = [
        list(module)
        for module in lm.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    ]
    if len(lists) != 1:
        raise ValueError(
            f"forward reuse needs one list of decoder blocks, {type(lm).__name__} has "
            f"{len(lists)}: use step.forward: separate"
        )
    return lists[0]


def host_boundary_bytes(
    tokens: float, row_tokens: int, layers: int, width: int, value_bytes: int
) -> float:
    """Host memory, in bytes, that a rank needs to keep block inputs in pinned memory.

    Args:
        tokens: of the rank's candidates. row_tokens: at most, of a scored row. layers, width: L and
            E. value_bytes: of one value.
    """
    token_bytes = width * value_bytes
    rows, rest = divmod(math.ceil(tokens), row_tokens)
    pinned = rows * pinned_bytes(row_tokens * token_bytes) + pinned_bytes(rest * token_bytes)
    return float((layers + 1) * pinned)


def pinned_bytes(size: float) -> int:
    """What torch's host allocator takes for a pinned tensor of `size` bytes: a power of two."""
    return 1 << (math.ceil(size) - 1).bit_length() if size > 0 else 0


def _dropouts(lm: nn.Module) -> Any:
    for name, module in lm.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            yield "model.lora.dropout" if "lora_dropout" in name else name, module.p
    config: Any = lm.config
    for name in ("attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        value = getattr(config, name, 0)
        if isinstance(value, float | int) and value > 0:
            yield name, value


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _hidden(out: Any) -> Tensor:
    """A block's hidden states; some return them in a tuple."""
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden
