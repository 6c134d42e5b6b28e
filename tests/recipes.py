"""Small runs for tests: a tiny model saved to disk, a config around it, a run's metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from slap_ds.config.schema import Config
from slap_ds.jsonl import read_lines

TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "glm": {"model_type": "glm", "head_dim": 16, "attention_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "mistral": {"model_type": "mistral", "sliding_window": 24},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "output_router_logits": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "glm4": {"model_type": "glm4", "head_dim": 16, "attention_bias": True},
    "glm4_moe": {
        "model_type": "glm4_moe",
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    },
    "glm4_moe_lite": {
        "model_type": "glm4_moe_lite",
        "mlp_layer_types": ["dense", "sparse"],
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "gpt2": {"model_type": "gpt2", "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}

# What an architecture derives from its other sizes.
NOT_OF = {"gpt2": ("intermediate_size", "num_key_value_heads")}

# Of a 2-block model on the demo vocabulary.
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 0,
}


def tiny_model(folder: Path, kind: str = "llama", **changes: Any) -> str:
    """Fresh weights of a 2-block model on the demo vocabulary, saved as a Hugging Face folder."""
    from slap_ds.models.load import load_config, load_model

    fields = {
        **TINY[kind],
        **{name: size for name, size in SIZES.items() if name not in NOT_OF.get(kind, ())},
        # Larger than usual, so that ten steps move something.
        "initializer_range": 0.1,
        **changes,
    }
    model = load_model(None, load_config(None, fields), dtype="float32", attention="sdpa", seed=11)
    model.save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


def tiny_config(path: str, run_dir: Path, **sections: Any) -> Config:
    """Ten steps of 16 candidates; `sections` are merged over the defaults, key by key."""
    raw: dict[str, Any] = {
        "run_dir": str(run_dir),
        "steps": 10,
        "seed": 3,
        "model": {"path": path, "tokenizer": "builtin:demo", "gradient_checkpointing": False},
        "data": {"train": ["builtin:demo/train"], "eval": ["builtin:demo/eval"], "max_tokens": 256},
        "batch": {"candidates": 16, "micro_batch_tokens": 384},
        "selection": {"method": "slap", "keep": 0.6},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "eps": 1e-6},
        "evaluation": {"max_samples": 8},
    }
    for name, value in sections.items():
        raw[name] = {**raw[name], **value} if isinstance(value, dict) and name in raw else value
    return Config.model_validate(raw)


def run_config(config: Config) -> list[dict[str, Any]]:
    """Train it in this process (a rank of a started group, or alone); returns the metrics."""
    from slap_ds.train.loop import train
    from slap_ds.train.run import prepare

    torch.manual_seed(123)  # nothing may depend on the global generator
    train(prepare(config))
    return read_lines(Path(config.run_dir) / "metrics.jsonl")


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in metrics if record["event"] == "train"]


def picks(run_dir: Path) -> list[list[int]]:
    return [record["ids"] for record in read_lines(run_dir / "picks.jsonl")]
