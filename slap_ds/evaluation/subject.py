"""What is evaluated: a run or a model folder, brought into one form.

    RUN    its newest checkpoint, exported (an adapter merged) -> folder; its config's data
    MODEL  a Hugging Face folder (an adapter merged)           -> folder; --data

Both give a `Config` of a run that only reads: the folder as its model, the evaluation files as
its data, one process.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from slap_ds.checkpoint.export import export
from slap_ds.checkpoint.generation import generation_config
from slap_ds.config.file import read_config
from slap_ds.config.schema import Config
from slap_ds.evaluation.answers import template_of
from slap_ds.files import feed
from slap_ds.models.load import DTYPES, load_config
from slap_ds.models.lora import load_adapted, merged

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    target: Path  # as the user named it
    folder: Path  # a whole Hugging Face folder
    step: int | None  # of the checkpoint, for a run
    out: Path  # where results go
    config: Config  # of a run that reads this folder and the evaluation data

    @property
    def weights(self) -> str:
        """sha256 (hex) of the folder's weights, model config and tokenizer."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            weights = path.suffix in (".safetensors", ".bin")
            if weights or path.name in ("config.json", "tokenizer.json"):
                digest.update(path.name.encode())
                feed(digest, path)
        return digest.hexdigest()


def is_run(target: Path) -> bool:
    """Whether `target` is the folder of a run."""
    return (target / "checkpoints").is_dir() or (target / "config.yaml").is_file()


def is_model(target: Path) -> bool:
    """Whether `target` is a Hugging Face folder, of a model or of an adapter."""
    return (target / "config.json").is_file() or (target / ADAPTER).is_file()


@contextmanager
def open_subject(
    target: Path, out: Path | None, data: Sequence[str], settings: Mapping[str, Any]
) -> Iterator[Subject]:
    """The subject; its folder may be gone afterwards.

    Args:
        out: folder of the results; default: `eval` in the model's folder, `eval/step-N` in a run's.
        data: evaluation files; none: those of the run's config.
        settings: `template`, `format`, `max_tokens`, `dtype`, `attention`; those that are None are
            the run's, or for a model its own template and dtype, auto, 1024 (less where it has
            fewer positions) and packed.

    Raises:
        FileNotFoundError: `target` is neither a run nor a model.
        ValueError: no evaluation data are named.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if not is_run(target) and is_model(target) and not data:
        raise ValueError("a model folder has no evaluation data of its own: name them with --data")
    with whole_folder(target, out) as folder:
        of_target = _of_run if is_run(target) else _of_model
        yield of_target(target, folder, out, data, given)


@contextmanager
def whole_folder(target: Path, out: Path | None) -> Iterator[Path]:
    """A Hugging Face folder with all weights of a run or model; it may be gone afterwards.

    Raises:
        FileNotFoundError: `target` is neither a run nor a model.
    """
    if not is_run(target) and not is_model(target):
        raise FileNotFoundError(
            f"{str(target)!r} is neither a run (no checkpoints) nor a Hugging Face model folder "
            "(no config.json)"
        )
    if not is_run(target) and not (target / ADAPTER).is_file():
        yield target
        return
    # Beside the results, not in /tmp, which may not have room for a model.
    parent = out or target
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".model-") as name:
        if is_run(target):
            lora = read_config(str(target / "config.yaml")).model.lora
            export(target, Path(name), merge=lora is not None)
        else:
            _merge(target, Path(name))
        yield Path(name)


def _merge(adapter: Path, folder: Path) -> None:
    """The adapter in its base model, as a whole model folder."""
    adapted = load_adapted(adapter)
    base = adapted.peft_config["default"].base_model_name_or_path
    model = merged(adapted)
    model.generation_config = generation_config(base, model, None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(folder)
    note = adapter / "slap_ds.json"
    if note.is_file():
        (folder / note.name).write_bytes(note.read_bytes())


def _of_run(
    run: Path, folder: Path, out: Path | None, data: Sequence[str], given: Mapping[str, Any]
) -> Subject:
    saved = read_config(str(run / "config.yaml"))
    step = json.loads((folder / "slap_ds.json").read_text("utf-8"))["step"]
    files = list(data) or saved.data.eval
    if not files:
        raise ValueError(
            f"{str(run)!r} names no evaluation data (data.eval): name some with --data"
        )
    raw = saved.model_dump(mode="json")
    raw["data"] |= {"train": files, "eval": [], "template": template_of(folder)}
    out = out or run / "eval" / f"step-{step:06d}"
    return Subject(run, folder, step, out, _reading(raw, folder, out, given))


def _of_model(
    target: Path, folder: Path, out: Path | None, data: Sequence[str], given: Mapping[str, Any]
) -> Subject:
    found = load_config(str(folder), None)
    positions = getattr(found.get_text_config(), "max_position_embeddings", None) or 1024
    raw: dict[str, Any] = {
        "model": {"dtype": _dtype_name(found), "attention": "packed"},
        "data": {
            "train": list(data),
            "template": template_of(folder),
            "max_tokens": min(1024, positions),
        },
    }
    out = out or target / "eval"
    return Subject(target, folder, None, out, _reading(raw, folder, out, given))


def _reading(raw: dict[str, Any], folder: Path, out: Path, given: Mapping[str, Any]) -> Config:
    """The config of a run of one process that has `folder` as its model."""
    of_model = {name: given.get(name, raw["model"][name]) for name in ("dtype", "attention")}
    of_data = ("format", "template", "max_tokens")
    data = {**raw["data"], **{name: given[name] for name in of_data if name in given}}
    rows = max(2048, data["max_tokens"])
    return Config.model_validate(
        {
            "run_dir": str(out),
            "steps": 1,
            "model": {"path": str(folder), "gradient_checkpointing": False, **of_model},
            "data": data,
            "batch": {"micro_batch_tokens": rows, "score_micro_batch_tokens": rows},
            "engine": {"kind": "torch"},
        }
    )


def _dtype_name(model_config: Any) -> str:
    """float16 weights are computed with in float32, which loses nothing."""
    return next((n for n, d in DTYPES.items() if d == model_config.dtype), "float32")
