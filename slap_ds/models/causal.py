"""A causal language model whose head scores or trains packed rows without whole logits.

    row -> blocks (transformers) -> hidden states of all tokens -> head -> scores or a loss

The head's work runs inside the output embedding's own `forward`: under ZeRO-3 that is where its
weight is gathered, with the hooks of ordinary training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slap_ds.data.packing import PackedRow
from slap_ds.scoring import HeadScores, Wants, WeightedTokenLoss, score_head

# What some architectures do to their logits after the head, which the closed form leaves out.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class PackedCausalLM(nn.Module):
    """Wraps a transformers causal LM; the one root module that the engine runs.

    Raises:
        ValueError: the architecture changes its logits after the head, or has no plain head.
    """

    def __init__(self, lm: Any, chunk_tokens: int) -> None:
        super().__init__()
        changes = {
            name: value
            for name in _LOGIT_CHANGES
            if (value := getattr(lm.config, name, None)) not in (None, 1, 1.0)
        }
        head = lm.get_output_embeddings()
        if changes or not isinstance(head, nn.Linear):
            raise ValueError(
                f"{type(lm).__name__} has no plain linear head"
                + (f" (its config sets {changes})" if changes else "")
                + ": its loss and curvature are not those of the closed form"
            )
        self.lm = lm
        self.chunk_tokens = chunk_tokens
        # `lm` keeps its own module tree, so that saved names are transformers' names.
        self._head = (head,)
        head.forward = _run_with_weight(head)

    def forward(
        self, row: PackedRow, mode: Literal["score", "train"], wants: Wants | None = None
    ) -> Any:
        """`score`: HeadScores of the row's samples as a tuple. `train`: the weighted sum of the
        row's token losses, a scalar to run backward on."""
        hidden = self.lm.base_model(
            input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False
        ).last_hidden_state[0]
        (head,) = self._head
        if mode == "train":
            return head(hidden, lambda h, w, b: self._train(h, w, b, row))
        assert wants is not None
        scores: HeadScores = head(hidden, lambda h, w, b: self._score(h, w, b, row, wants))
        return scores

    def _train(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, row: PackedRow) -> Tensor:
        # A row without samples (n = 0) has one token of weight 0.
        token_weight = row.weights[row.sample] if len(row.weights) else row.sample.float()
        loss: Tensor = WeightedTokenLoss.apply(
            hidden, weight, bias, row.targets, token_weight, self.chunk_tokens
        )
        return loss

    def _score(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, row: PackedRow, wants: Wants
    ) -> HeadScores:
        return score_head(
            hidden,
            weight,
            bias,
            row.targets,
            row.sample,
            len(row.positions),
            gradient=wants.gradient,
            diagonal=wants.diagonal,
            chunk_tokens=self.chunk_tokens,
        )


def _run_with_weight(head: nn.Linear) -> Callable[..., Any]:
    """`head(hidden, fn)` runs fn(hidden, weight, bias) where the weight is whole."""

    def forward(hidden: Tensor, fn: Callable[[Tensor, Tensor, Tensor | None], Any]) -> Any:
        return fn(hidden, head.weight, head.bias)

    return forward


def block_flops(model_config: Any, parameters: int, lengths: Sequence[int]) -> float:
    """FLOPs (2 per multiply-add) of one forward through the blocks over packed samples.

    2 per block parameter and token, plus causal attention, 2 * L * E_attn * len^2 per sample
    (scores and values, half of the square each). Embeddings are look-ups and cost nothing.

    Args:
        parameters: all of the model's, head and embeddings included. lengths: tokens per sample.
    """
    text = model_config.get_text_config()
    tied = bool(getattr(model_config, "tie_word_embeddings", False))
    blocks = parameters - text.vocab_size * text.hidden_size * (1 if tied else 2)
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    squares = float(sum(int(n) ** 2 for n in lengths))
    attention = 2.0 * text.num_hidden_layers * heads * head_dim * squares
    return 2.0 * blocks * float(sum(lengths)) + attention


def head_flops(model_config: Any, response_tokens: int) -> float:
    """FLOPs of one (T, E) x (E, V) product at the head; only response tokens meet it."""
    text = model_config.get_text_config()
    return 2.0 * text.vocab_size * text.hidden_size * response_tokens


def count_parameters(lm: nn.Module) -> int:
    """All parameters, the partitioned ones of ZeRO-3 at full size, shared ones once."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in lm.parameters())


def enable_checkpointing(lm: Any) -> None:
    """Recompute each block in the backward; non-reentrant, so it works without grads on inputs."""
    # transformers 5.2x renamed it and warns about the old name.
    enable = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def trainable(lm: nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in lm.parameters() if p.requires_grad]
