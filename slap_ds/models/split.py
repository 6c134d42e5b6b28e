"""One row's tokens over several ranks: DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509).

    row.part(rank, n) -> blocks, token by token
                         attention: whole(q, k, v) -> all tokens, 1/n of the heads -> own(out)
                      -> head -> sums of this rank's tokens -> total(scores)

Only attention looks beyond a token, and it looks at each head apart: n ranks exchange their tokens
of all heads for all tokens of their share of the heads, and back. What a rank holds of a row is
every n-th token, so the exchanged tokens are in order after a transpose.

Shape letters: n ranks, t tokens on each, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slap_ds.scoring import HeadScores

# transformers' names of layers in which attention alone looks at other tokens.
_ATTENTION = frozenset({"full_attention", "sliding_attention"})
# What scales positions by the longest sample, of which ranks see different ends.
_BY_LENGTH = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class Split:
    """This rank's place among those that share its rows, and what they tell each other."""

    rank: int = 0
    ranks: int = 1
    # (n, ...): entry j goes to rank j, entry j of the result comes from there; autograd knows it.
    exchange: Callable[[Tensor], Tensor] = lambda x: x
    sum: Callable[[Tensor], Tensor] = lambda x: x  # over the ranks

    def whole(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, H, t, d) each -> (1, H / n, n t, d): all tokens, of this rank's heads.

        Fewer key and value heads than ranks go to several.

        Raises:
            ValueError: the ranks cannot share the heads.
        """
        if self.ranks == 1:
            return query, key, value
        check_heads(query.shape[1], key.shape[1], self.ranks)
        sent = [self._by_rank(x) for x in (query, key, value)]
        got = self.exchange(torch.cat(sent, -1)).transpose(0, 1).flatten(0, 1)  # (n t, ...)
        parts = got.split([x.shape[-1] for x in sent], -1)
        q, k, v = (
            part.unflatten(-1, (-1, x.shape[-1])).transpose(0, 1)[None]
            for part, x in zip(parts, (query, key, value), strict=True)
        )
        return q, k, v

    def own(self, out: Tensor) -> Tensor:
        """(1, n t, H / n, d) -> (1, t, H, d): the same backwards, of attention's result."""
        if self.ranks == 1:
            return out
        heads, width = out.shape[2:]
        got = self.exchange(out[0].flatten(1).view(-1, self.ranks, heads * width).transpose(0, 1))
        return got.transpose(0, 1).reshape(1, -1, self.ranks * heads, width)

    def total(self, scores: HeadScores) -> HeadScores:
        """The sums over all ranks' tokens."""
        if self.ranks == 1:
            return scores
        found: dict[str, Any] = scores._asdict()
        for whole_numbers in (True, False):  # which stay so
            here = {
                name: x
                for name, x in found.items()
                if x is not None and x.is_floating_point() != whole_numbers
            }
            flat = self.sum(torch.cat([x.flatten() for x in here.values()]))
            parts = flat.split([x.numel() for x in here.values()])
            found |= {n: p.view_as(x) for (n, x), p in zip(here.items(), parts, strict=True)}
        return scores._replace(**found)

    def _by_rank(self, x: Tensor) -> Tensor:
        """(1, H, t, d) -> (n, t, H / n * d): each rank's heads."""
        _, heads, tokens, width = x.shape
        x = x.repeat_interleave(max(1, self.ranks // heads), 1)
        return x.view(self.ranks, -1, tokens, width).transpose(1, 2).flatten(2)


ALONE = Split()


def check_heads(heads: int, kv_heads: int, ranks: int) -> None:
    """Refuse heads that `ranks` ranks cannot share.

    Raises:
        ValueError: they do not divide evenly.
    """
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise ValueError(
            f"engine.sequence_parallel is {ranks}, and the model has {heads} attention heads with "
            f"{kv_heads} for keys and values: it must divide the first, and divide the second or "
            "be a multiple of it"
        )


def check_split(model_config: Any, ranks: int) -> None:
    """Refuse a model whose rows `ranks` ranks cannot share, before it is loaded.

    Raises:
        ValueError: its heads cannot be divided, or something else than attention looks at other
            tokens or at the length of a row.
    """
    if ranks == 1:
        return
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    check_heads(heads, getattr(text, "num_key_value_heads", None) or heads, ranks)
    odd = sorted(set(getattr(text, "layer_types", None) or ()) - _ATTENTION)
    if kinds := sorted(_rope_types(getattr(text, "rope_parameters", None)) & _BY_LENGTH):
        odd.append(f"{kinds[0]} rotary positions")
    if getattr(text, "output_router_logits", False):
        odd.append("a balance loss of routers (output_router_logits)")
    if odd:
        raise ValueError(
            f"engine.sequence_parallel: {text.model_type} has {', '.join(odd)}, which looks at "
            "more of a sample than the tokens of one rank: set engine.sequence_parallel 1"
        )


def _rope_types(parameters: Any) -> set[str]:
    """Of rotary positions, whose parameters some models have by kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    kinds = {parameters["rope_type"]} if "rope_type" in parameters else set()
    return kinds.union(*(_rope_types(part) for part in parameters.values()))
