"""Attention over packed rows, sample by sample: `packed`, an attention of transformers' registry.

A mask over a whole row costs T * T whatever is in it, and its sums depend on what else the row
holds. Here every sample attends to itself alone: the cost is the sum of len^2, and a sample's
values are the same in whatever row it lies.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from slap_ds.compat import varlen_attention
from slap_ds.models.split import ALONE, Split

NAME = "packed"
_packed = varlen_attention()


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sample_lengths: Sequence[int] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    split: Split = ALONE,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sample of one row.

    Args:
        query: (1, H, T, d); key, value: (1, H_kv, T, d), H a multiple of H_kv.
        sample_lengths: tokens of each sample, in row order; they sum to T.
        cu_seq_lens_q: (n + 1,) int32, their running sum from 0.
        split: how the row's tokens are spread over ranks; T above is then those of the whole row,
            and of each tensor the rank's part of it.
        sliding_window: a token sees itself and this many minus one before it; None: all.

    Returns: (1, T, H, d).

    Raises:
        ValueError: the model did not pass the samples' lengths on, or wants its attention scores
            capped (Gemma 2) or given a sink (GPT-OSS), which is not built here.
    """
    if sample_lengths is None or cu_seq_lens_q is None:
        raise ValueError(
            f"model.attention packed: {type(module).__name__} is not given the samples' lengths by "
            "its model: set model.attention to sdpa or eager"
        )
    if softcap is not None or s_aux is not None:
        raise ValueError(
            f"model.attention packed: {type(module).__name__} caps its scores or has attention "
            "sinks, which packed attention does not: set model.attention to eager"
        )
    assert attention_mask is None, "packed attention takes its structure from the samples' lengths"
    query, key, value = split.whole(query, key, value)
    if _packed is not None and not dropout and has_kernel(query, value):
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        options = {"scale": scaling, "window_size": window}
        longest = max(sample_lengths)
        return split.own(_varlen(query, key, value, cu_seq_lens_q, longest, options)[None]), None
    parts = []
    for q, k, v in zip(
        query.split(list(sample_lengths), 2),
        key.split(list(sample_lengths), 2),
        value.split(list(sample_lengths), 2),
        strict=True,
    ):
        mask = _window(q.shape[2], sliding_window, q.device)
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        parts.append(out.transpose(1, 2))
    return split.own(torch.cat(parts, 1)), None


def has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether torch's variable-length attention can run these: on a GPU, in half precision, heads
    of one width that is a multiple of 8 and at most 256."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    width = query.shape[-1]
    return query.is_cuda and half and width % 8 == 0 and width <= 256 and value.shape[-1] == width


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, options: dict[str, Any]
) -> Tensor:
    """(1, H, T, d), (1, H_kv, T, d) twice -> (T, H, d), by whatever this torch's function takes."""
    assert _packed is not None
    known = inspect.signature(_packed).parameters
    if "enable_gqa" in known:  # torch 2.13; without it 2.11 shares heads by itself or not at all
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        query, key, value = _same_heads(query, key, value)
    if "num_splits" in known:  # else a sample's bits depend on what else is in the row
        options["num_splits"] = 1
    rows = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    out: Tensor = _packed(*rows, ends, ends, longest, longest, **options)
    return out


def _same_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Repeat the key and value heads up to the query's; not every build's kernel shares them."""
    times = query.shape[1] // key.shape[1]
    if times == 1:
        return query, key, value
    return query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(len, len) bool, True where seen; None where plain causal attention is the same."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance
    return (distance >= 0) & (distance < window)


AttentionInterface.register(NAME, packed_attention)
