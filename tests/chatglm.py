"""Tiny checkpoints in the published ChatGLM layout, and their forward pass, for tests.

Names and shapes are those of the published checkpoints; the forward is written from the
architecture's description, without transformers.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch.nn.functional import linear, silu

from slap_ds.data.formats import Message

REPO = Path(__file__).parents[1]
DATA = Path(os.environ.get("SLAP_DATA_DIR", REPO / ".." / "shared" / "data"))
GLM4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The fields of the published ChatGLM3-6B config.json, with small sizes.
CONFIG: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 40,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 48,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 3,
    "original_rope": True,
    "padded_vocab_size": 1280,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def original_weights(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Random weights under the published names."""
    generator = torch.Generator().manual_seed(5)
    width, inner = config["hidden_size"], config["ffn_hidden_size"]
    heads, head = config["num_attention_heads"], config["kv_channels"]
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else heads

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.1).to(dtype)

    def norm() -> torch.Tensor:
        return (1 + 0.3 * torch.randn(width, generator=generator)).to(dtype)

    table = 1.0 / 10000 ** (torch.arange(0, head // 2, 2) / (head // 2))
    found = {
        "transformer.embedding.word_embeddings.weight": normal(config["padded_vocab_size"], width),
        "transformer.rotary_pos_emb.inv_freq": table.to(dtype),
    }
    for layer in range(config["num_layers"]):
        at = f"transformer.encoder.layers.{layer}."
        rows = (heads + 2 * groups) * head
        found[at + "input_layernorm.weight"] = norm()
        found[at + "self_attention.query_key_value.weight"] = normal(rows, width)
        if config["add_qkv_bias"]:
            found[at + "self_attention.query_key_value.bias"] = normal(rows)
        found[at + "self_attention.dense.weight"] = normal(width, heads * head)
        found[at + "post_attention_layernorm.weight"] = norm()
        found[at + "mlp.dense_h_to_4h.weight"] = normal(2 * inner, width)
        found[at + "mlp.dense_4h_to_h.weight"] = normal(width, inner)
    found["transformer.encoder.final_layernorm.weight"] = norm()
    found["transformer.output_layer.weight"] = normal(config["padded_vocab_size"], width)
    return found


def forward(config: dict[str, Any], weights: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of one sequence of token ids (T,)."""
    heads, head = config["num_attention_heads"], config["kv_channels"]
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else heads
    length = len(ids)
    turns = _turns(config, length)
    hidden_later = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + config["layernorm_epsilon"]).rsqrt()
        return x * scale * weights[name]

    x = weights["transformer.embedding.word_embeddings.weight"][ids]  # (T, E)
    for layer in range(config["num_layers"]):
        at = f"transformer.encoder.layers.{layer}."
        mixed = linear(
            norm(x, at + "input_layernorm.weight"),
            weights[at + "self_attention.query_key_value.weight"],
            weights.get(at + "self_attention.query_key_value.bias"),
        )
        if config["multi_query_attention"]:
            q, k, v = mixed.split([heads * head, groups * head, groups * head], -1)
        else:
            # Head by head: q, k, v of the first, q, k, v of the second, ...
            q, k, v = mixed.view(length, heads, 3, head).unbind(2)
        q = _rotate(q.reshape(length, heads, head), turns)
        k = _rotate(k.reshape(length, groups, head), turns)
        v = v.reshape(length, groups, head)
        out = []
        for number in range(heads):
            group = number // (heads // groups)
            scores = q[:, number] @ k[:, group].T / head**0.5  # (T, T)
            out.append(scores.masked_fill(hidden_later, -torch.inf).softmax(-1) @ v[:, group])
        x = x + linear(torch.cat(out, -1), weights[at + "self_attention.dense.weight"])
        inner = linear(
            norm(x, at + "post_attention_layernorm.weight"),
            weights[at + "mlp.dense_h_to_4h.weight"],
        )
        gate, up = inner.chunk(2, -1)
        x = x + linear(silu(gate) * up, weights[at + "mlp.dense_4h_to_h.weight"])
    x = norm(x, "transformer.encoder.final_layernorm.weight")
    return linear(x, weights["transformer.output_layer.weight"])


def _turns(config: dict[str, Any], length: int) -> torch.Tensor:
    """Unit complex numbers (T, head / 4): how far each pair turns at each position."""
    width = config["kv_channels"] // 2
    ratio = config.get("rope_ratio", 1)
    divides = "chatglm2" in config["_name_or_path"]  # ChatGLM2-6B-32K: the positions, not the base
    base = 10000.0 if divides else 10000.0 * ratio
    speed = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    positions = torch.arange(length, dtype=torch.float32) / (ratio if divides else 1)
    angle = torch.outer(positions, speed)
    return torch.polar(torch.ones_like(angle), angle)


def _rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turns neighbours as pairs in the first half of each head; the second half stays."""
    half = x.shape[-1] // 2
    pairs = torch.view_as_complex(x[..., :half].reshape(*x.shape[:-1], half // 2, 2))
    turned = torch.view_as_real(pairs * turns[:, None]).flatten(-2)
    return torch.cat([turned, x[..., half:]], -1)


def greedy(config: dict[str, Any], weights: dict[str, Any], ids: list[int], new: int) -> list[int]:
    for _ in range(new):
        ids = [*ids, int(forward(config, weights, torch.tensor(ids))[-1].argmax())]
    return ids


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, Any],
    tokenizer: bytes,
    kind: str = "safetensors",
    files: int = 2,
) -> Path:
    """A folder as published: weight files with an index (or one without), and tokenizer.model."""
    folder.mkdir(parents=True)
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    names = list(weights)
    size = -(-len(names) // files)
    weight_map = {}
    for number in range(files):
        part = {name: weights[name] for name in names[number * size : (number + 1) * size]}
        name = f"{stem}-{number + 1:05d}-of-{files:05d}.{kind}" if files > 1 else f"{stem}.{kind}"
        weight_map.update(dict.fromkeys(part, name))
        if kind == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})
    if files > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(tokenizer)
    (folder / "tokenizer_config.json").write_text('{"remove_space": false, "do_lower_case": false}')
    return folder


@cache
def demo_texts() -> tuple[str, ...]:
    """Every message of the demo conversations, Chinese and English."""
    found = []
    for name in ("train", "eval"):
        path = REPO / "slap_ds" / "data" / "demo" / f"{name}.jsonl"
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line:
                found += [message["content"] for message in json.loads(line)["messages"]]
    return tuple(found)


@cache
def real_conversations() -> tuple[tuple[Message, ...], ...]:
    """Conversations from every file of the shared data; none where there is no data."""
    found = []
    for path in sorted(DATA.glob("*/*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            for _, line in zip(range(60), file, strict=False):
                messages = json.loads(line)["messages"]
                found.append(tuple(Message(m["role"], m["content"]) for m in messages))
    return tuple(found)


@cache
def real_texts() -> tuple[str, ...]:
    return tuple(message.content for talk in real_conversations() for message in talk)


@cache
def sentencepiece_model(**changes: Any) -> bytes:
    """A byte-fallback BPE trained with SentencePiece itself, set up as ChatGLM's is."""
    import sentencepiece

    file = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 1200,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.98,
        "num_threads": 1,
        "minloglevel": 2,
        **changes,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(demo_texts()), model_writer=file, **settings
    )
    return file.getvalue()


@cache
def tiktoken_ranks() -> bytes:
    """A file of tiktoken ranks, as GLM-4's, from a small byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GLM4_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1100, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(demo_texts(), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(hidden)}
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(byte_of[letter] for letter in left + right) for left, right in merges]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    return b"".join(lines)
