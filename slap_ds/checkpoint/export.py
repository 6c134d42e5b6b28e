"""From a run's newest or best checkpoint to a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from slap_ds import jsonl
from slap_ds.checkpoint import find as checkpoints
from slap_ds.checkpoint.card import write_card
from slap_ds.checkpoint.generation import generation_config
from slap_ds.checkpoint.state import VALUES
from slap_ds.compat import tied_names
from slap_ds.config.schema import Config
from slap_ds.data.kept_tokenizer import save_tokenizer
from slap_ds.data.stream import CandidateStream
from slap_ds.data.templates import make_template
from slap_ds.distributed.comm import Comm
from slap_ds.engine.whole_state import whole_weights
from slap_ds.models.glm.convert import KEPT
from slap_ds.models.load import DTYPES, load_config, load_tokenizer, whole_files
from slap_ds.models.lora import check_merged, logits_of, merged, with_adapter


def export(
    run_dir: Path,
    out: Path,
    merge: bool = False,
    licence: str | None = None,
    best: bool = False,
) -> Path:
    """Write weights (safetensors), config, tokenizer, chat template and a model card of a run into
    `out`.

    A run with model.lora gives its adapter in peft's format, with `merge` the merged model.

    Args:
        licence: for the model card, by a hub's name of it.
        best: the checkpoint of the best evaluation, kept by checkpoint.best; not the newest.

    Raises:
        FileNotFoundError: the run has no whole checkpoint.
        ValueError: the checkpoint's weights do not fit its config, or there is nothing to merge.
    """
    chosen = _checkpoint(run_dir, best)
    config = Config.model_validate(chosen.manifest["config"])
    if merge and config.model.lora is None:
        raise ValueError(f"{str(run_dir)!r} trained no adapter: export it without --merge")
    model = _adapted(config, chosen.folder, merge) if config.model.lora else _whole(config, chosen)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path or "")
    template = make_template(config.data.template, tokenizer)
    if config.model.lora is None or merge:
        probe = logits_of(model) if merge else None
        model = merged(model) if merge else model
        model.generation_config = generation_config(config.model.path, model, template.stop_ids)
        model.config.use_cache = True
        model.save_pretrained(out)
        if probe is not None:
            check_merged(out, probe, DTYPES[config.model.dtype])
    else:
        model.save_pretrained(out, save_embedding_layers=False)
    save_tokenizer(tokenizer, template, out)
    note = {
        "run": run_dir.name,
        "step": chosen.step,
        "steps": _steps(config, chosen),
        "template": template.name,
    }
    (out / "slap_ds.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    write_card(out, run_dir, chosen, licence)
    # safetensors makes its files readable for their owner alone.
    for file in out.iterdir():
        if file.is_file():
            file.chmod((out / "slap_ds.json").stat().st_mode)
    kept = Path(config.model.path or "") / KEPT
    if config.model.path and kept.is_dir():  # the way back of a converted ChatGLM
        shutil.copytree(kept, out / KEPT, dirs_exist_ok=True)
    return out


def _checkpoint(run_dir: Path, best: bool) -> checkpoints.Checkpoint:
    newest = checkpoints.newest(run_dir, Comm())
    if newest is None:
        raise FileNotFoundError(f"{str(run_dir)!r} holds no whole checkpoint to export")
    if not best:
        return newest
    step = _state(newest).get("best", {}).get("step", 0)
    found = next((c for c in checkpoints.find(run_dir) if c.step == step), None)
    if found is None:
        raise FileNotFoundError(
            f"{str(run_dir)!r} keeps no checkpoint of its best evaluation: train with "
            "checkpoint.best, or export without --best"
        )
    checkpoints.check(found)
    return found


def _state(checkpoint: checkpoints.Checkpoint) -> Any:
    return jsonl.loads((checkpoint.folder / VALUES).read_bytes())


def _steps(config: Config, newest: checkpoints.Checkpoint) -> int:
    """How many steps the whole run has."""
    state = _state(newest)
    samples, candidates = state["stream"]["samples"], config.batch.candidates
    return len(
        CandidateStream(samples, candidates, config.seed, steps=config.steps, epochs=config.epochs)
    )


def _whole(config: Config, newest: checkpoints.Checkpoint) -> Any:
    """The transformers model with the checkpoint's weights."""
    model_config = load_config(config.model.path, config.model.config)
    dtype = DTYPES[config.model.dtype]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    weights = {name: value.to(dtype) for name, value in whole_weights(newest.folder).items()}
    problem = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    missing = sorted(set(problem.missing_keys) - tied_names(model))
    if missing or problem.unexpected_keys:
        raise ValueError(
            f"{newest.folder} does not fit its model: missing {missing[:3]}, "
            f"unknown {problem.unexpected_keys[:3]}"
        )
    return model


def _adapted(config: Config, checkpoint: Path, merge: bool) -> Any:
    """peft's model with the checkpoint's adapter; without `merge` its base has no weights."""
    path, lora = config.model.path, config.model.lora
    assert lora is not None
    dtype = DTYPES[config.model.dtype]
    if merge:
        with whole_files("model.path", path or ""):
            base = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
    else:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(load_config(path, None), dtype=dtype)
    weights = {name: value.to(dtype) for name, value in whole_weights(checkpoint).items()}
    return with_adapter(base, lora, weights, path)
