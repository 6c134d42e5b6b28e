"""The layout of ChatGLM2, ChatGLM3 and GLM-4 checkpoints, and where each part of it is in Glm.

config.json -> check_architecture -> read_sizes -> layout: each original tensor <-> Glm's
                                                -> glm_config, original_config
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GlmConfig

INV_FREQ = "transformer.rotary_pos_emb.inv_freq"
_ENDS = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
_IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
# Settings that change the network, with the only values Glm has.
_FIXED = {
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "hidden_dropout": 0.0,
}
_NEEDED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "padded_vocab_size",
    "num_attention_heads",
    "kv_channels",
    "seq_length",
    "layernorm_epsilon",
)


@dataclass(frozen=True)
class Sizes:
    """The sizes that a ChatGLM config gives, under one set of names."""

    layers: int
    width: int  # E, the hidden size
    inner: int
    vocab: int
    heads: int
    groups: int  # of query heads that share a key and a value
    head_width: int
    qkv_bias: bool
    by_head: bool  # query_key_value is q, k, v of head 0, of head 1, ...; else all q, all k, all v


@dataclass(frozen=True)
class Link:
    """A tensor of the original layout and what it is in Glm: one tensor, or q, k and v."""

    original: str
    shape: tuple[int, ...]
    ours: dict[str, tuple[int, ...]]


def check_architecture(config: Mapping[str, Any], src: Path) -> None:
    """Raises ValueError for a model that is none of ChatGLM2, ChatGLM3 and GLM-4."""
    kind = config.get("model_type")
    if kind in ("glm", "glm4"):
        raise ValueError(f"{src} is in transformers' own layout already ({kind}): use it as it is")
    if kind != "chatglm":
        raise ValueError(
            f"{src} has model_type {kind!r}, expected 'chatglm': ChatGLM2-6B, ChatGLM3-6B or "
            "GLM-4-9B"
        )
    if {"position_encoding_2d", "inner_hidden_size", "max_sequence_length"} & config.keys():
        raise ValueError(
            f"{src} is ChatGLM-6B (v1), another architecture that transformers does not have: use "
            "ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B"
        )
    for key, what in (
        ("quantization_bit", "is quantised: convert the full-precision checkpoint"),
        ("vision_config", "has a vision model, which Glm has not: use a text-only checkpoint"),
        ("pre_seq_len", "has a P-tuning prefix, which Glm has not: convert the base checkpoint"),
    ):
        if config.get(key):
            raise ValueError(f"{src} {what} (config.json: {key} = {str(config[key])[:40]})")
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{src}/config.json has {key} = {config[key]}, expected {value}: Glm has no other"
            )


def read_sizes(config: Mapping[str, Any], src: Path) -> Sizes:
    """Raises ValueError where the config lacks a size or they do not fit together."""
    by_head = not config.get("multi_query_attention", False)
    groups = "num_attention_heads" if by_head else "multi_query_group_num"
    if lacking := [key for key in (*_NEEDED, groups) if config.get(key) is None]:
        raise ValueError(
            f"{src}/config.json lacks {', '.join(lacking)}: is it of ChatGLM2, ChatGLM3 or GLM-4?"
        )
    sizes = Sizes(
        layers=int(config["num_layers"]),
        width=int(config["hidden_size"]),
        inner=int(config["ffn_hidden_size"]),
        vocab=int(config["padded_vocab_size"]),
        heads=int(config["num_attention_heads"]),
        groups=int(config[groups]),
        head_width=int(config["kv_channels"]),
        qkv_bias=bool(config.get("add_qkv_bias", False)),
        by_head=by_head,
    )
    if sizes.heads % sizes.groups or sizes.head_width % 4:
        raise ValueError(
            f"{src}/config.json has {sizes.heads} heads of width {sizes.head_width} in "
            f"{sizes.groups} groups: expected equal groups and a width that 4 divides"
        )
    return sizes


def layout(sizes: Sizes) -> Iterator[Link]:
    """Every tensor of the original layout, with what it is in Glm."""
    s = sizes
    queries, keys = s.heads * s.head_width, s.groups * s.head_width
    shapes: dict[str, tuple[int, ...]] = {
        "self_attention.dense.weight": (s.width, queries),
        "mlp.dense_h_to_4h.weight": (2 * s.inner, s.width),
        "mlp.dense_4h_to_h.weight": (s.width, s.inner),
    }
    for original, ours in _ENDS.items():
        shape: tuple[int, ...] = (s.width,) if "norm" in original else (s.vocab, s.width)
        yield Link(original, shape, {ours: shape})
    for layer in range(s.layers):
        before, after = f"transformer.encoder.layers.{layer}.", f"model.layers.{layer}."
        for original, ours in _IN_LAYER.items():
            shape = shapes.get(original, (s.width,))
            yield Link(before + original, shape, {after + ours: shape})
        tails: dict[str, tuple[int, ...]] = {"weight": (s.width,)}
        if s.qkv_bias:
            tails["bias"] = ()
        for end, tail in tails.items():
            parts: dict[str, tuple[int, ...]] = {
                f"{after}self_attn.{part}_proj.{end}": (rows, *tail)
                for part, rows in (("q", queries), ("k", keys), ("v", keys))
            }
            shape = (queries + 2 * keys, *tail)
            yield Link(f"{before}self_attention.query_key_value.{end}", shape, parts)


def split_qkv(fused: torch.Tensor, sizes: Sizes) -> list[torch.Tensor]:
    """Weight (rows, E) or bias (rows,) of query_key_value to those of q, k and v."""
    if sizes.by_head:
        heads = fused.unflatten(0, (sizes.heads, 3, sizes.head_width))
        return [part.flatten(0, 1) for part in heads.unbind(1)]
    keys = sizes.groups * sizes.head_width
    return list(fused.split([sizes.heads * sizes.head_width, keys, keys]))


def join_qkv(parts: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """The inverse of `split_qkv`."""
    if sizes.by_head:
        heads = [part.unflatten(0, (sizes.heads, sizes.head_width)) for part in parts]
        return torch.stack(heads, 1).flatten(0, 2)
    return torch.cat(parts)


def glm_config(
    config: Mapping[str, Any], sizes: Sizes, family: str, more: Mapping[str, Any]
) -> GlmConfig:
    """The transformers config of the converted model; `more` goes into it as it is."""
    ratio = float(config.get("rope_ratio") or 1)
    rope = {"rope_type": "default", "rope_theta": 1e4 * ratio, "partial_rotary_factor": 0.5}
    if family == "chatglm2" and ratio != 1:
        # ChatGLM2-6B-32K divides the positions; its successors raise the base.
        rope |= {"rope_type": "linear", "rope_theta": 1e4, "factor": ratio}
    return GlmConfig(
        architectures=["GlmForCausalLM"],
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.groups,
        head_dim=sizes.head_width,
        max_position_embeddings=int(config["seq_length"]),
        rms_norm_eps=float(config["layernorm_epsilon"]),
        attention_bias=sizes.qkv_bias,
        attention_dropout=float(config.get("attention_dropout", 0.0)),
        rope_parameters=rope,
        **more,
    )


def original_config(glm: GlmConfig) -> dict[str, Any]:
    """As published, as far as Glm's config tells; heads of their own count as groups of one."""
    rope = glm.rope_parameters
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        **_FIXED,
        "add_qkv_bias": glm.attention_bias,
        "attention_dropout": glm.attention_dropout,
        "ffn_hidden_size": glm.intermediate_size,
        "hidden_size": glm.hidden_size,
        "kv_channels": glm.head_dim,
        "layernorm_epsilon": glm.rms_norm_eps,
        "multi_query_attention": True,
        "multi_query_group_num": glm.num_key_value_heads,
        "num_attention_heads": glm.num_attention_heads,
        "num_layers": glm.num_hidden_layers,
        "original_rope": True,
        "padded_vocab_size": glm.vocab_size,
        "rope_ratio": rope.get("factor", rope["rope_theta"] / 1e4),
        "seq_length": glm.max_position_embeddings,
        "tie_word_embeddings": False,
        "eos_token_id": glm.eos_token_id,
        "pad_token_id": glm.pad_token_id,
    }


def inv_freq(width: int) -> torch.Tensor:
    """(width / 2,) float32: the rotary frequencies that the original checkpoints hold."""
    # The published code computes its rotary table anew, but its checkpoints hold this one.
    return 1.0 / (10000 ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
