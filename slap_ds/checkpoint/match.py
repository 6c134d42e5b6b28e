"""Whether a run can go on from a checkpoint, and what has been changed since.

facts_of(config, ...) -> the manifest of a checkpoint -> check_matches, changed_settings
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slap_ds.checkpoint.find import Checkpoint
from slap_ds.checkpoint.state import TENSORS
from slap_ds.config.deepspeed import resolve_deepspeed
from slap_ds.config.schema import Config
from slap_ds.errors import counted

# Facts in which a run may differ from its checkpoint with checkpoint.reshard.
RESHARDED = ("engine", "zero_stage", "optimizer.kind")
# What a checkpoint's weights and a model must have in common.
_SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def facts_of(config: Config, model_config: Any, data_fingerprint: str) -> dict[str, Any]:
    """What a checkpoint and the run that goes on from it must have in common, for its manifest."""
    lora, text = config.model.lora, model_config.get_text_config()
    stage = None
    if config.engine.kind == "deepspeed":
        settings = resolve_deepspeed(config, 1, text.hidden_size)
        stage = settings["zero_optimization"].get("stage", 0)
    return {
        "engine": config.engine.kind,
        "zero_stage": stage,
        "model": {name: getattr(text, name, None) for name in _SHAPE},
        "model.dtype": config.model.dtype,
        "optimizer.kind": config.optimizer.kind,
        "data_fingerprint": data_fingerprint,
        "seed": config.seed,
        "model.lora": None if lora is None else lora.model_dump(mode="json"),
    }


def check_matches(
    checkpoint: Checkpoint, world: int, facts: Mapping[str, Any], reshard: bool = False
) -> None:
    """Refuse a checkpoint that this run cannot continue from, before any model is built.

    Raises:
        ValueError: naming what differs.
    """
    saved = checkpoint.manifest
    if TENSORS not in checkpoint.files:
        raise ValueError(
            f"{checkpoint.folder} was saved by slap_ds {saved.get('version')}; only runs of "
            "0.2.0 and later can be resumed: finish this one with the version that started it, or "
            "use another run_dir"
        )
    if saved["world_size"] != world and not reshard:
        before = counted(saved["world_size"], "rank")
        raise ValueError(
            f"{checkpoint.folder} was saved by {before}, this run has {world}: start {before}, set "
            "checkpoint.reshard, or start a fresh run in another run_dir"
        )
    for name, value in facts.items():
        if (name in RESHARDED and reshard) or saved.get(name, value) == value:
            continue
        what = f"with {name} = {saved.get(name)}, this run has {value}"
        if name == "data_fingerprint":  # two hashes tell nobody anything
            what = "on other training data (data, template, tokenizer, max_tokens or their limits)"
        raise ValueError(
            f"{checkpoint.folder} was saved {what}: resume with what it was saved with, or start "
            "in another run_dir"
        )


def changed_settings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{dotted key: [in the checkpoint, now]} of what was set otherwise when it was saved.

    Where a run lies, what it saves and how it evaluates are left out: they train nothing.
    """
    before, now = _flat(checkpoint.manifest.get("config") or config), _flat(config)
    outside = ("run_dir", "checkpoint", "evaluation", "profile")
    keys = [k for k in now if k.split(".")[0] not in outside]
    return {k: [before[k], now[k]] for k in keys if k in before and before[k] != now[k]}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
