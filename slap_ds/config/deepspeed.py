"""The DeepSpeed JSON of a run: the user's file, every "auto" filled in from the run's config."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slap_ds.config.file import set_dotted
from slap_ds.config.schema import Config

DEFAULT_DEEPSPEED = Path(__file__).parent / "zero3.json"
# What a file may hold beside what is filled in below. DeepSpeed ignores sections it does not know,
# and some that it knows do not go together with batches that are chosen at every step.
_SECTIONS = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "bf16",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "csv_monitor",
        "data_types",
        "disable_allgather",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "gradient_predivide_factor",
        "memory_breakdown",
        "seq_parallel_communication_data_type",
        "steps_per_print",
        "tensorboard",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_node_local_storage",
        "wall_clock_breakdown",
        "wandb",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)


def resolve_deepspeed(config: Config, world_size: int, hidden_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration with every "auto" filled in.

    One packed row is DeepSpeed's micro-batch of 1; how many rows a step takes varies, so the
    accumulation boundary is set by us and gradient_accumulation_steps stays 1.

    Raises:
        ValueError: the file is missing or not JSON, or a value of it contradicts `config`; every
            contradiction is listed.
    """
    path = Path(config.engine.deepspeed) if config.engine.deepspeed else DEFAULT_DEEPSPEED
    if not path.is_file():
        raise FileNotFoundError(f"engine.deepspeed: no file at {str(path)!r}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"engine.deepspeed: {path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"engine.deepspeed: {path} holds no JSON object")
    problems = [*_unknown(settings)]
    zero = settings.setdefault("zero_optimization", {})
    if not isinstance(zero, dict) or "stage" not in zero:
        raise ValueError(
            f"engine.deepspeed: {path} has no zero_optimization.stage, expected 0, 1, 2 or 3"
            + "".join(f"\n  {problem}" for problem in problems)
        )
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16.enabled": config.model.dtype == "bfloat16",
        "fp16.enabled": False,
    }
    sizes: dict[str, Any] = {
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, value in {**ours, **sizes}.items():
        found = _get_dotted(settings, key)
        if found is None and key in sizes:
            continue
        if found is None or found == "auto":
            set_dotted(settings, key, value)
        elif key in ours and found != value:
            problems.append(f'{key} is {found!r}, this run needs {value!r} (or "auto")')
    if "optimizer" in settings or "scheduler" in settings:
        problems.append("optimizer and scheduler belong in the run's YAML (optimizer section)")
    # AdamW is torch's, which DeepSpeed takes for untested and, offloaded, wants to replace.
    for key, value in {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }.items():
        if settings.setdefault(key, value) != value:
            problems.append(f"{key} is {settings[key]!r}, this run needs {value!r}")
    offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if config.model.dtype == "bfloat16" and zero["stage"] in (2, 3) and not offloads:
        # In bfloat16 the sum loses more with every row. (A host's memory is too dear for it.)
        settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if zero["stage"] not in (0, 1, 2, 3):
        problems.append(f"zero_optimization.stage is {zero.get('stage')!r}, expected 0, 1, 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        # DeepSpeed keeps swapped optimizer groups out of the shards that our checkpoints are made
        # of, and cannot load a checkpoint into weights that are swapped.
        if (zero.get(key) or {}).get("device") == "nvme":
            problems.append(
                f"zero_optimization.{key}.device is 'nvme', expected 'cpu' or 'none': checkpoints "
                "of swapped tensors can't be resumed or exported; use 'cpu', or more devices"
            )
    problems += [f'{key} is "auto", which is not known here' for key in _autos(settings)]
    if problems:
        raise ValueError(f"engine.deepspeed: {path}\n" + "\n".join(f"  {p}" for p in problems))
    return settings


def _unknown(settings: dict[str, Any]) -> Iterator[str]:
    """One line for each section that is not switched off and does not belong there."""
    for key, value in settings.items():
        off = value is False or (isinstance(value, dict) and value.get("enabled") is False)
        if key in _SECTIONS or key in ("optimizer", "scheduler") or off:
            continue
        near = difflib.get_close_matches(key, _SECTIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "take it out"
        yield f"{key} is not a section that this trainer can use; {hint}"


def _get_dotted(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return None
        tree = tree[part]
    return tree


def _autos(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == "auto":
            yield f"{prefix}{key}"
