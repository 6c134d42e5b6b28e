"""A causal language model whose head scores or trains packed rows without whole logits.

    row -> blocks (transformers) -> hidden states of all tokens -> head -> scores or a loss

The head's work runs inside the output embedding's own `forward`: under ZeRO-3 that is where its
weight is gathered, with the hooks of ordinary training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from slap_ds.compat import attention_of, checkpoint_by_transformers, whole_size
from slap_ds.data.packing import PackedRow
from slap_ds.models.blocks import Checkpointing, find_blocks, own
from slap_ds.models.experts import Mode, RouterBalance
from slap_ds.models.reuse import BlockInputs
from slap_ds.models.split import ALONE, Split
from slap_ds.scoring import (
    Head,
    HeadScores,
    Recorded,
    Response,
    ScoreRequest,
    Tail,
    WeightedTokenLoss,
    recorded,
    score_head,
    score_tail,
    token_subset,
)


class LogitMap(NamedTuple):
    """What some architectures do to their logits: cap * tanh(scale * logits / cap)."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitMap:
        """From a transformers config: Cohere multiplies, Granite divides, Gemma 2 caps.

        Raises:
            ValueError: another architecture sets a scale; what it means there is not known here.
        """
        scale = 1.0
        for name, family in (("logit_scale", "cohere"), ("logits_scaling", "granite")):
            value = getattr(config, name, None)
            if value in (None, 1):
                continue
            if not config.model_type.startswith(family):
                raise ValueError(
                    f"{config.model_type} sets {name} = {value}, which is known of {family} alone: "
                    "its loss and curvature would be wrong"
                )
            scale = value if family == "cohere" else 1 / value
        caps = ("final_logit_softcapping", "logits_soft_cap")
        return cls(scale, next((c for n in caps if (c := getattr(config, n, None))), None))


class PackedCausalLM(nn.Module):
    """Wraps a transformers causal LM; the one root module that the engine runs.

    Raises:
        ValueError: the model has no plain linear head, or changes its logits in an unknown way.
    """

    def __init__(self, lm: Any, chunk_tokens: int, block_inputs: BlockInputs | None = None) -> None:
        super().__init__()
        head = lm.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"{type(lm).__name__} has no plain linear head: its loss and curvature are not "
                "those of the closed form"
            )
        self.logits = LogitMap.of(lm.config.get_text_config())
        self.tail: Tail | None = None  # set by the engine where scoring needs the last blocks
        self.lm = lm
        self.chunk_tokens = chunk_tokens
        self.block_inputs = block_inputs
        self.balance: RouterBalance | None = None  # set by the engine that trains
        self.split: Split = ALONE  # set by an engine whose ranks share rows
        # Some classes name another attribute as their base, and transformers then gives the whole.
        base = lm.base_model if lm.base_model is not lm else getattr(lm, "model", None)
        if base is None:
            raise ValueError(
                f"{type(lm).__name__} does not say which part of it is below its head: take "
                "another architecture, such as llama, glm, qwen2 or mistral"
            )
        self._base = (base,)
        # `lm` keeps its own module tree, so that saved names are transformers' names.
        self._head = (head,)
        self.take_head()

    def take_head(self) -> None:
        """Let the output embedding run our functions where its weight is whole."""
        (head,) = self._head
        head.forward = _run_with_weight(head)  # type: ignore[method-assign]

    def give_head_back(self) -> None:
        """Leave the output embedding as it was, for whoever copies or saves the module."""
        (head,) = self._head
        vars(head).pop("forward", None)

    def forward(
        self,
        row: PackedRow,
        mode: Literal["score", "train", "own"],
        request: ScoreRequest | None = None,
    ) -> Any:
        """`score`: HeadScores of the row's samples as a tuple. `train`: the weighted sum of the
        row's token losses, a scalar to run backward on. `own`: the sum of the token losses of the
        row's logits as the model itself computes them, whole, to compare with."""
        if self.balance is None:
            return self._run(row, mode, request)
        self.balance.enter(row, self._use(mode))
        result = self._run(row, mode, request)
        self.balance.leave(result)
        return result

    def _use(self, mode: str) -> Mode | None:
        """What a row's forward is for, if it ends in a gradient."""
        inputs = self.block_inputs
        if inputs is not None and inputs.mode != "train" and mode != "own":
            return inputs.mode
        return "train" if mode == "train" else None

    def _run(
        self,
        row: PackedRow,
        mode: Literal["score", "train", "own"],
        request: ScoreRequest | None,
    ) -> Any:
        if mode == "own":
            return self.loss_of_logits(self.lm(**self.arguments(row)).logits, row)
        if self.block_inputs is not None:
            self.block_inputs.enter(row)
        with self._recorder(request) as record:
            hidden = self._base[0](**self.arguments(row)).last_hidden_state[0]
        (head,) = self._head
        # Its formulas say themselves what is rounded; a Trainer's autocast is for the blocks.
        with torch.autocast(hidden.device.type, enabled=False):
            if mode == "train":
                return head(hidden, lambda h, w, b: self._train(h.to(w.dtype), w, b, row))
            assert request is not None
            scores: HeadScores = head(
                hidden, lambda h, w, b: self._score(h.to(w.dtype), w, b, row, request, record)
            )
        return scores

    def arguments(self, row: PackedRow) -> dict[str, Any]:
        """A row as the model's own forward takes it."""
        return {
            "input_ids": row.input_ids,
            "position_ids": row.position_ids,
            "use_cache": False,
            **_structure(self.lm.config, row, self.split),
        }

    def loss_of_logits(self, logits: Tensor, row: PackedRow) -> Tensor:
        """The sum of the row's token losses by its whole logits (1, T, V)."""
        targets = row.targets.to(logits.device)
        return nn.functional.cross_entropy(logits[0].float(), targets, reduction="sum")

    def _train(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, row: PackedRow) -> Tensor:
        # A row without samples (n = 0) has one token of weight 0.
        token_weight = row.weights[row.sample] if len(row.weights) else row.sample.float()
        scale, cap = self.logits
        scaled = hidden if scale == 1 else hidden * scale
        loss: Tensor = WeightedTokenLoss.apply(  # type: ignore[no-untyped-call]
            scaled, weight, bias, row.targets, token_weight, self.chunk_tokens, cap, _response(row)
        )
        return loss

    def _score(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row: PackedRow,
        request: ScoreRequest,
        record: Recorded | None,
    ) -> HeadScores:
        scale, cap = self.logits
        head = Head(weight, bias, cap)
        response = _response(row, request)
        scores = score_head(
            hidden,
            head,
            row.targets,
            row.sample,
            len(row.where),
            request,
            chunk_tokens=self.chunk_tokens,
            scale=scale,
            response=response,
        )
        if record is None:
            return scores
        assert self.tail is not None
        return score_tail(
            self.tail,
            record,
            head,
            row.targets,
            row.sample,
            scores,
            request,
            chunk_tokens=self.chunk_tokens,
            scale=scale,
            response=response,
        )

    def _recorder(self, request: ScoreRequest | None) -> AbstractContextManager[Recorded | None]:
        if request is None or not request.blocks:
            return nullcontext()
        return recorded(self.lm, request.blocks)


def _response(row: PackedRow, request: ScoreRequest | None = None) -> Response:
    """The row's response tokens, and which of them count for the diagonal, if not all do."""
    sample, kept = row.response_sample, None
    if request is not None and request.token_share < 1:
        position, offset = row.positions[sample], torch.from_numpy(row.response_offset)
        share = request.token_share
        kept = token_subset(request.seed, request.step, position, offset, share).numpy()
    return Response(row.response, sample, kept)


def _structure(config: Any, row: PackedRow, split: Split) -> dict[str, Any]:
    """What attentions that don't read `position_ids` need to keep samples apart."""
    attention = attention_of(config) or ""
    if row.ranks > 1:  # attention sees the whole row
        lengths = tuple(row.ranks * n for n in row.lengths)
        ends = row.ranks * row.cu_seqlens
        return {"sample_lengths": lengths, "cu_seq_lens_q": ends, "split": split}
    if attention == "packed":
        return {"sample_lengths": row.lengths, "cu_seq_lens_q": row.cu_seqlens}
    if attention.startswith("flash_attention"):
        ends, longest = row.cu_seqlens, max(row.lengths)
        return {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    return {}


def _run_with_weight(head: nn.Linear) -> Callable[..., Any]:
    """`head(hidden, fn)` runs fn(hidden, weight, bias) where the weight is whole; without `fn` the
    head does what it did."""

    def forward(
        hidden: Tensor, fn: Callable[[Tensor, Tensor, Tensor | None], Any] = nn.functional.linear
    ) -> Any:
        return fn(hidden, head.weight, head.bias)

    return forward


def block_flops(model_config: Any, parameters: int, lengths: Sequence[int]) -> float:
    """FLOPs (2 per multiply-add) of one forward through the blocks over packed samples.

    2 per block parameter and token, plus causal attention, 2 * L * E_attn * len^2 per sample
    (scores and values, half of the square each). Embeddings are look-ups and cost nothing.

    Args:
        parameters: that a token meets, head and embeddings included. lengths: tokens per sample.
    """
    text = model_config.get_text_config()
    blocks = float(block_parameters(model_config, parameters))
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    squares = float(sum(int(n) ** 2 for n in lengths))
    attention: float = 2.0 * text.num_hidden_layers * heads * head_dim * squares
    return 2.0 * blocks * float(sum(lengths)) + attention


def block_parameters(model_config: Any, parameters: int) -> int:
    """Of all `parameters` of a model those that are neither embeddings nor head."""
    text = model_config.get_text_config()
    tied = bool(getattr(model_config, "tie_word_embeddings", False))
    outside: int = text.vocab_size * text.hidden_size * (1 if tied else 2)
    return parameters - outside


def head_flops(model_config: Any, response_tokens: int) -> float:
    """FLOPs of one (T, E) x (E, V) product at the head; only response tokens meet it."""
    text = model_config.get_text_config()
    return 2.0 * float(text.vocab_size * text.hidden_size * response_tokens)


def count_parameters(lm: nn.Module) -> int:
    """All parameters, the partitioned ones of ZeRO-3 at full size, shared ones once."""
    return sum(whole_size(p) for p in lm.parameters())


def enable_checkpointing(lm: Any) -> None:
    """Recompute each block in the backward; non-reentrant, so it works without grads on inputs.

    Where the blocks are not one list, transformers knows what to recompute.
    """
    try:
        blocks = find_blocks(lm)
    except ValueError:
        checkpoint_by_transformers(lm)
        return
    for block in blocks:
        own(block, Checkpointing())


def trainable(lm: nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that training changes."""
    return [p for p in lm.parameters() if p.requires_grad]
