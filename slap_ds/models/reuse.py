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
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from slap_ds.compat import version_of
from slap_ds.data.packing import PackedRow
from slap_ds.models.blocks import Args, Checkpointing, Named, Run, find_blocks, hidden_of, own
from slap_ds.models.host_copies import Arriving, HostCopies
from slap_ds.models.recompute import Recompute

Mode = Literal["train", "score", "replay"]


class BlockInputs(Checkpointing):
    """The boundary of a model's blocks that can also record their inputs and replay them.

    Args:
        blocks: the decoder blocks in order.
        on_host: keep recorded inputs in (pinned) host memory.
    """

    def __init__(self, blocks: list[nn.Module], on_host: bool) -> None:
        self.mode: Mode = "train"
        self.on_host = on_host
        # Around a block's recompute: its weights stay gathered for the gradient that follows.
        self.held: Callable[[nn.Module], AbstractContextManager[Any]] = lambda block: nullcontext()
        self._index = {id(block): i for i, block in enumerate(blocks)}
        self._last = len(blocks) - 1
        self._recompute = Recompute()
        self._rows: list[int] = []  # tokens of each row that was scored
        self._rest: tuple[Any, ...] | None = None  # what blocks return beside hidden states
        self._changed = False  # whether a block was given something else than the one before left
        self._left: Tensor | None = None  # by the block before
        self._embedded: tuple[Tensor, int] | None = None  # by the embedding, and its version then
        self._embeds = False  # whether the first block is given just that, and the record is near
        self._spans: dict[int, tuple[int, int, int]] = {}  # position -> row, start, end
        self._recorded: list[list[Tensor]] = []  # [boundary 0..L][scored row] -> (T, E)
        # [row to replay][boundary 0..L] -> pieces of (T, E), one unless they lie on the host
        self._cuts: list[list[list[Tensor]]] = []
        self._current: list[Arriving] = []  # the row being replayed
        self.copies = HostCopies()
        self.peak_bytes = 0  # most bytes of boundaries held at once since start_scoring

    def start_scoring(self) -> None:
        """Forget the last step; the rows that follow are recorded."""
        self.mode = "score"
        self._spans, self._cuts, self._current, self._rows = {}, [], [], []
        self._recorded = [[] for _ in range(self._last + 2)]
        self._changed, self._embeds = False, not self.on_host
        self.peak_bytes = 0

    def check(self, lm: nn.Module) -> None:
        """Refuse to replay what the scored rows of `lm` left, if that is not all of it.

        Raises:
            ValueError: a row did not pass all L + 1 boundaries once each, the model does something
                between its blocks, or they return more than hidden states.
        """
        whole = sum(
            [len(x) for x in boundaries] == [tokens] * (self._last + 2)
            for tokens, *boundaries in zip(self._rows, *self._recorded, strict=False)
        )
        counts = {len(scored) for scored in self._recorded}
        problem = ""
        if whole < len(self._rows) or counts != {len(self._rows)}:
            seen = sum(len(scored) > 0 for scored in self._recorded)
            problem = f"{seen} of {self._last + 2} block boundaries were met in the scoring forward"
        elif self._changed:
            problem = "a block was not given what the block before it returned"
        elif any(value is not None for value in self._rest or ()):
            problem = "its blocks return more than hidden states"
        if problem:
            raise ValueError(
                f"forward reuse does not work with {type(lm).__name__} of transformers "
                f"{transformers.__version__}: {problem}; use step.forward: separate"
            )

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
            number, start = len(self._rows), 0
            self._rows.append(row.input_ids.shape[1])
            for position, length in zip(row.where, row.lengths, strict=False):
                self._spans[position] = (number, start, start + length)
                start += length
        elif self.mode == "replay":
            device = row.input_ids.device
            self._current = []  # before the next row is loaded: one is on the device at a time
            # The last first: the backward asks for them in this order.
            cuts = [self.copies.load(pieces, device) for pieces in reversed(self._cuts.pop(0))]
            self._current = cuts[::-1]

    def compute(self, block: nn.Module, run: Run, args: Args, named: Named) -> Any:
        """Rows that are neither recorded nor replayed are trained with ordinary checkpointing."""
        if self.mode == "train":
            return super().compute(block, run, args, named)
        if self.mode == "score":
            return run(*args, **named)
        return self._recompute(block, lambda: run(*args, **named))

    def call(self, block: nn.Module, run: Run, args: Args, named: Named) -> Any:
        """What `block` returns: computed, or as it was recorded."""
        if self.mode == "train":
            return run(*args, **named)
        i = self._index[id(block)]
        hidden = args[0] if args else named.pop("hidden_states")
        run = _bound(run, args[1:], named)
        if self.mode == "score":
            return self._score(i, hidden, run)
        arriving, after = self._current[i], self._current[i + 1].tensor[None]
        if i == self._last:  # nobody looks at the values of the others' outputs
            self._current[i + 1].wait()

        kind = hidden.device.type
        mixed = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def again(x: Tensor) -> Tensor:
            arriving.wait()
            # The backward knows nothing of the precision that the forward ran in.
            with self.held(block), torch.autocast(kind, mixed[1], enabled=mixed[0]):
                return hidden_of(run(x))

        before = arriving.tensor[None]
        out = _Replay.apply(hidden, before, after, again)  # type: ignore[no-untyped-call]
        return out if self._rest is None else (out, *self._rest)

    def embed(self, embedding: nn.Module, run: Callable[[], Tensor]) -> Tensor:
        """What the input embedding returns: computed, or as it was recorded, where the first block
        is given just that. Its weights then are whole in the backward alone."""
        if self.mode != "replay" or not self._embeds:
            out = run()
            if self.mode == "score":
                self._embedded = out, version_of(out)
            return out
        known = self._current[0].tensor[None].detach()
        if not any(weight.requires_grad for weight in embedding.parameters()):
            return known.requires_grad_(True)

        def again(_: Tensor) -> Tensor:
            with self.held(embedding):
                return run()

        nothing = known.new_empty(0, requires_grad=True)
        replayed: Tensor = _Replay.apply(nothing, nothing, known, again)  # type: ignore[no-untyped-call]
        return replayed

    def _score(self, i: int, hidden: Tensor, run: Callable[[Tensor], Any]) -> Any:
        """Keep what block `i` is given, and what the last one returns."""
        self._record(i, hidden)
        if i == 0:
            out, version = self._embedded or (None, 0)
            same = out is not None and hidden.data_ptr() == out.data_ptr()
            self._embeds &= same and version_of(hidden) == version
            self._embedded = None
        if i > 0 and (self._left is None or hidden.data_ptr() != self._left.data_ptr()):
            self._changed = True
        out = run(hidden)
        self._left = hidden_of(out)
        self._rest = out[1:] if isinstance(out, tuple) else None
        if i == self._last:
            self._record(i + 1, self._left)
            self._left = None
        return out

    def _record(self, boundary: int, hidden: Tensor) -> None:
        kept = hidden[0].detach()
        self._recorded[boundary].append(self.copies.keep(kept) if self.on_host else kept)

    def _cut(self, scored: list[Tensor], row: PackedRow) -> list[Tensor]:
        """A row's tokens of one boundary, cut out of the scored rows: (T, E) in pieces."""
        if not row.where:  # an empty row has one token that trains nothing
            return [torch.zeros_like(scored[0][:1])]
        spans = [self._spans[position] for position in row.where]
        pieces = [scored[number][start:end] for number, start, end in spans]
        return pieces if self.on_host else [torch.cat(pieces)]


class _Embedding:
    """The boundary of the input embedding."""

    def __init__(self, inputs: BlockInputs) -> None:
        self._inputs = inputs

    def call(self, block: nn.Module, run: Run, args: Args, named: Named) -> Any:
        return self._inputs.embed(block, lambda: run(*args, **named))

    def compute(self, block: nn.Module, run: Run, args: Args, named: Named) -> Any:
        return run(*args, **named)


class _Replay(torch.autograd.Function):
    """Forward: a block's recorded output. Backward: recompute the block from its recorded input."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        block_input: Tensor,
        block_output: Tensor,
        recompute: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.recompute = recompute
        ctx.save_for_backward(block_input)
        return block_output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (block_input,) = ctx.saved_tensors
        x = block_input.detach().requires_grad_(True)
        with torch.enable_grad():
            out = ctx.recompute(x)
        # ZeRO-3's hooks reduce and release the block's parameters inside this backward.
        torch.autograd.backward(out, grads[0])
        ctx.recompute = None
        return x.grad, None, None, None


def _bound(run: Run, rest: Args, named: Named) -> Callable[[Tensor], Any]:
    return lambda hidden: run(hidden, *rest, **named)


def install(lm: Any, on_host: bool = False) -> BlockInputs:
    """Make a `BlockInputs` the boundary of the blocks of `lm`.

    Raises:
        ValueError: the model's blocks cannot be found, or draw random numbers (dropout), so that a
            recomputed block would differ.
    """
    try:
        blocks = find_blocks(lm)
    except ValueError as error:
        raise ValueError(f"forward reuse: {error}: use step.forward: separate") from None
    dropout = sorted(
        {f"{name} = {value}" for name, value in _dropouts(lm) if isinstance(value, float | int)}
    )
    if dropout:
        raise ValueError(
            f"forward reuse needs a model without dropout, found {', '.join(dropout[:4])}: set it "
            "to 0, in the model's config or where it is named, or use step.forward: separate"
        )
    inputs = BlockInputs(blocks, on_host)
    for block in blocks:
        own(block, inputs)
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    # A tied weight takes both gradients in one backward of the row, not this one by itself.
    if not {id(p) for p in embedding.parameters()} & {id(p) for p in head.parameters()}:
        own(embedding, _Embedding(inputs))
    return inputs


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
    for name in (
        "attention_dropout",
        "hidden_dropout",
        "attn_pdrop",
        "resid_pdrop",
        "embd_pdrop",
        "router_jitter_noise",
    ):
        value = getattr(config, name, 0)
        if isinstance(value, float | int) and value > 0:
            yield name, value


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()
