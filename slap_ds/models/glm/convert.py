"""ChatGLM2, ChatGLM3 and GLM-4 checkpoints to transformers' own Glm layout, and back.

    config.json -> sizes -> links (each original tensor <-> one of Glm's, or its q, k and v)
    weight files -> names and shapes checked against the links -> tensors split or joined -> files
    tokenizer.model -> fast tokenizer with its chat template (glm_tokenizer)

The published code of these checkpoints does not run under transformers 5. `GlmForCausalLM` is the
same network: rotary pairs are interleaved in both, so that no weight is permuted.

What the folder held besides weights is kept in `chatglm_original`, so that a tuned model can go
back where it came from.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import progress as bars
from rich.console import Console
from safetensors.torch import save_file
from transformers import GenerationConfig, GlmConfig, PreTrainedTokenizerFast

from slap_ds.data.glm_templates import GLM_TEMPLATES
from slap_ds.models.glm.layout import (
    INV_FREQ,
    check_architecture,
    glm_config,
    inv_freq,
    join_qkv,
    layout,
    original_config,
    read_sizes,
    split_qkv,
)
from slap_ds.models.glm.shards import (
    ShardWriter,
    find_shards,
    look_into,
    read,
    read_json,
    write_json,
)
from slap_ds.models.glm.tokenizer import SPECIAL, Family, build_tokenizer
from slap_ds.models.glm.vocab import is_tiktoken

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEPT = "chatglm_original"
_DROPPED = "dropped.safetensors"
_SHARD_BYTES = 2 << 30


def convert_chatglm(
    src: Path,
    dst: Path,
    *,
    reverse: bool = False,
    dtype: str | None = None,
    family: str | None = None,
    console: Console | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write the checkpoint in `src` into the new folder `dst` in the other layout.

    Args:
        reverse: from Glm's layout to the original.
        dtype: a key of DTYPES; None keeps that of each tensor.
        family: chatglm2, chatglm3 or glm4, where the folder does not show which it is.

    Raises:
        FileNotFoundError: `src` lacks its config, tokenizer.model or a weight file.
        ValueError: `src` is of another architecture or damaged, or `dst` is in use.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: expected {', '.join(DTYPES)}")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst} is in use: name a new folder")
    console = console or Console(stderr=True, markup=False)
    config = read_json(src / "config.json")
    # Written aside, then renamed, so that a visible folder is a whole one.
    part = dst.with_name(f".{dst.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        writer = ShardWriter(part, DTYPES[dtype] if dtype else None, shard_bytes)
        if reverse:
            _to_original(src, part, config, writer, console)
        else:
            _to_glm(src, part, config, writer, family, console)
        if dst.exists():
            dst.rmdir()
        os.replace(part, dst)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _say(console, f"wrote {dst}")


def _to_glm(
    src: Path,
    dst: Path,
    config: dict[str, Any],
    writer: ShardWriter,
    family: str | None,
    console: Console,
) -> None:
    check_architecture(config, src)
    sizes = read_sizes(config, src)
    links = {link.original: link for link in layout(sizes)}
    shards = find_shards(src)
    found = look_into(shards)
    _check_tensors(
        {name: shape for name, shape in found.items() if name != INV_FREQ},
        {name: link.shape for name, link in links.items()},
        src,
    )
    kind = find_family(src, config, family)
    tokenizer = build_tokenizer(src, kind)
    if len(tokenizer) > sizes.vocab:
        raise ValueError(
            f"{src}/tokenizer.model gives {len(tokenizer)} tokens, the model has {sizes.vocab} "
            "embeddings: is the tokenizer from another checkpoint?"
        )
    _check_added_tokens(src / "tokenizer_config.json", tokenizer)
    _say(console, f"{kind}, {sizes.layers} layers of width {sizes.width}, {len(shards)} files")

    kept = dst / KEPT
    kept.mkdir()
    for path in sorted(src.iterdir()):
        wanted = path.suffix in (".json", ".model", ".py", ".jinja")
        if path.is_file() and wanted and not path.name.endswith(".index.json"):
            shutil.copyfile(path, kept / path.name)
    for name, tensor in _each(shards, len(found), console):
        if name == INV_FREQ:
            save_file({name: tensor.clone()}, kept / _DROPPED)
            _say(console, f"dropped {name}: Glm computes it")
            continue
        link = links[name]
        parts = [tensor] if len(link.ours) == 1 else split_qkv(tensor, sizes)
        for ours, part in zip(link.ours, parts, strict=True):
            writer.add(ours, part)
    writer.close()

    stops = tokenizer.convert_tokens_to_ids(list(GLM_TEMPLATES[kind].stops))
    pad = tokenizer.pad_token_id
    ends = {"eos_token_id": stops, "pad_token_id": pad, "dtype": _name(writer.main_dtype())}
    glm_config(config, sizes, kind, ends).save_pretrained(dst)
    GenerationConfig(eos_token_id=stops, pad_token_id=pad).save_pretrained(dst)
    tokenizer.save_pretrained(dst)
    write_json(dst / "slap_ds.json", {"template": kind})


def _to_original(
    src: Path, dst: Path, config: dict[str, Any], writer: ShardWriter, console: Console
) -> None:
    if config.get("model_type") != "glm":
        raise ValueError(
            f"{src} has model_type {config.get('model_type')!r}, expected 'glm': --reverse takes a "
            "folder that `convert chatglm` wrote, or a model tuned from one"
        )
    kept = src / KEPT
    now = original_config(GlmConfig.from_pretrained(src))
    original = read_json(kept / "config.json") if kept.is_dir() else now
    sizes = read_sizes(original, kept)
    if replace(sizes, by_head=False) != read_sizes(now, src):
        raise ValueError(f"{kept}/config.json describes another model than {src}/config.json")
    links = {name: link for link in layout(sizes) for name in link.ours}
    shards = find_shards(src)
    wanted = {name: shape for link in links.values() for name, shape in link.ours.items()}
    _check_tensors(look_into(shards), wanted, src)

    held: dict[str, torch.Tensor] = {}
    for name, tensor in _each(shards, len(wanted), console):
        held[name] = tensor
        link = links[name]
        # q, k and v may lie in different files.
        if held.keys() >= link.ours.keys():
            parts = [held.pop(part) for part in link.ours]
            writer.add(link.original, parts[0] if len(parts) == 1 else join_qkv(parts, sizes))
    dtype = writer.main_dtype()
    if (kept / _DROPPED).is_file():
        for name, tensor in read(kept / _DROPPED):
            writer.add(name, tensor)
    elif not kept.is_dir():
        writer.add(INV_FREQ, inv_freq(sizes.head_width // 2).to(dtype))
    writer.close()

    if kept.is_dir():
        for path in sorted(kept.iterdir()):
            if path.name != _DROPPED:
                shutil.copyfile(path, dst / path.name)
    else:
        _say(
            console,
            f"{src} has no {KEPT} folder: copy tokenizer.model and the code files of the published "
            "checkpoint into the new folder",
        )
    write_json(dst / "config.json", {**original, "torch_dtype": _name(dtype)})


def find_family(src: Path, config: Mapping[str, Any], given: str | None) -> Family:
    """Which of the three a folder is: ChatGLM2 and 3 differ in their tokenizer and prompts only."""
    path = src / "tokenizer.model"
    ranks = path.is_file() and is_tiktoken(path)
    if given is not None:
        for family in SPECIAL:
            if family == given and (family == "glm4") == ranks:
                return family
        fitting = "glm4" if ranks else "chatglm2 or chatglm3"
        raise ValueError(f"family {given!r} does not fit {path}: expected {fitting}")
    if ranks:
        return "glm4"
    code = src / "tokenization_chatglm.py"
    no_roles = code.is_file() and "<|user|>" not in code.read_text("utf-8", errors="replace")
    named = "chatglm2" in str(config.get("_name_or_path", "")).lower()
    return "chatglm2" if named or no_roles else "chatglm3"


def _check_tensors(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], src: Path
) -> None:
    wrong = [name for name in found.keys() & wanted.keys() if found[name] != wanted[name]]
    problems = {
        "lack": sorted(wanted.keys() - found.keys()),
        "hold, unknown in this layout,": sorted(found.keys() - wanted.keys()),
    }
    for problem, names in problems.items():
        if names:
            shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
            raise ValueError(
                f"the weight files in {src} {problem} {len(names)} tensor{'s' * (len(names) > 1)} "
                f"({shown}): is config.json of the same checkpoint?"
            )
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"{src}: {name} has shape {found[name]}, config.json says {wanted[name]}: are they of "
            "the same checkpoint?"
        )


def _check_added_tokens(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    added = read_json(path).get("added_tokens_decoder", {}) if path.is_file() else {}
    for key, entry in added.items():
        name, ours = entry["content"], tokenizer.convert_ids_to_tokens(int(key))
        if ours not in (name, f"<{name}>"):  # sop and eop have another name here
            raise ValueError(
                f"{path} gives id {key} to {name!r}, the published tokenizer to {ours!r}: tokens "
                "that were added to it cannot be converted"
            )


def _each(shards: list[Path], count: int, console: Console) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of every file, with a progress bar."""
    with bars.Progress(console=console) as progress:
        task = progress.add_task("tensors", total=count)
        for path in shards:
            progress.update(task, description=path.name)
            for name, tensor in read(path):
                yield name, tensor
                progress.advance(task)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
