"""A model card for an exported folder, and the way to a hub.

run's config, manifest and metrics.jsonl -> README.md: what was trained, on what, how, results
push(folder, repo)                       -> a repository of a hub, by huggingface_hub
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData

from slap_ds.checkpoint.find import Checkpoint
from slap_ds.config.schema import Config
from slap_ds.jsonl import read_lines

_PACKAGES = ("slap_ds", "torch", "transformers", "deepspeed")


def write_card(out: Path, run_dir: Path, checkpoint: Checkpoint, licence: str | None) -> None:
    """README.md in `out`, the fields that hubs read on top; it names no path of this machine.

    Args:
        licence: a hub's name of it, such as apache-2.0; None: the card says that none is stated.
    """
    config = Config.model_validate(checkpoint.manifest["config"])
    base = _public(config.model.path) if config.model.path else None
    data = ModelCardData(
        license=licence,
        library_name="peft" if (out / "adapter_config.json").exists() else "transformers",
        pipeline_tag="text-generation",
        base_model=base if base and "/" in base else None,
        datasets=[name for name in map(_public, config.data.train) if "/" in name] or None,
        tags=["slap_ds", "data-selection"],
    )
    lines = [f"---\n{data.to_yaml()}\n---", f"# {run_dir.name}", _what(config, base, licence)]
    lines += ["## Training", _table(_facts(config, checkpoint))]
    if results := _results(run_dir, checkpoint.step):
        lines += ["## Results", "Losses on the evaluation data, nats per trained token.", results]
    lines += ["## Versions", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES) + "."]
    (out / "README.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def push(folder: Path, repo: str, public: bool) -> str:
    """Upload an exported folder; the token is that of HF_TOKEN or `hf auth login`.

    Args:
        repo: OWNER/NAME, made if it is not there, as a private one unless `public`.

    Returns: its address.

    Raises:
        ValueError: the hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        found = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=found.repo_id, folder_path=folder, commit_message="Upload by slap-ds export"
        )
    except Exception as error:  # those of its HTTP library, which is another one now and then
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--push {repo}: {first}; {_remedy(error)}. What was to be uploaded is in {folder}: "
            f"`hf upload {repo} {folder}` tries again"
        ) from None
    return str(found)


def _remedy(error: Exception) -> str:
    """What helps against an error of the hub's."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (400, 401, 403, 404) or isinstance(error, ValueError):
        return (
            "name OWNER/NAME, and log in with `hf auth login` or HF_TOKEN, to an account that may "
            "write there"
        )
    if status is None:
        return "see that HF_ENDPOINT is a hub that can be reached, and HF_HUB_OFFLINE is 0"
    return "the hub did not take it now"


def _public(name: str) -> str:
    """A hub name as it is; of a path of this machine the last part."""
    local = name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists()
    return Path(name).name if local or "*" in name else name


def _what(config: Config, base: str | None, licence: str | None) -> str:
    start = f"fine-tuned from {base}" if base else "trained from fresh weights"
    adapter = (
        "" if config.model.lora is None else f" by a LoRA adapter of rank {config.model.lora.r}"
    )
    stated = "No licence is stated: those of the base model and the data apply."
    return (
        f"A language model {start}{adapter} with slap_ds, which at every step trains a part of a "
        f"candidate batch.{'' if licence else ' ' + stated}"
    )


def _facts(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    selection = config.selection
    return {
        "data": ", ".join(map(_public, config.data.train)),
        "selection method": selection.method,
        "keep ratio": selection.keep,
        "optimizer steps": checkpoint.step,
        "candidates a step": config.batch.candidates,
        "longest sample": f"{config.data.max_tokens} tokens",
        "learning rate": config.optimizer.lr,
        "precision": config.model.dtype,
        "seed": config.seed,
    }


def _results(run_dir: Path, step: int) -> str:
    """The evaluations up to this checkpoint, first and last, all tasks."""
    file = run_dir / "metrics.jsonl"
    records = read_lines(file) if file.exists() else []
    found = [r for r in records if r["event"] == "eval" and r["step"] < step]
    if not found:
        return ""
    first, last = found[0], found[-1]
    tasks = sorted(last["eval_loss_by_task"])
    rows = [("all", first["eval_loss"], last["eval_loss"])]
    rows += [
        (task, first["eval_loss_by_task"].get(task, float("nan")), last["eval_loss_by_task"][task])
        for task in (tasks if len(tasks) > 1 else [])
    ]
    head = f"| task | after {first['step'] + 1} steps | after {last['step'] + 1} steps |\n"
    lines = [f"| {task} | {before:.4f} | {after:.4f} |" for task, before, after in rows]
    return head + "| --- | --- | --- |\n" + "\n".join(lines)


def _table(facts: dict[str, Any]) -> str:
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {key} | {x} |" for key, x in facts.items())


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
