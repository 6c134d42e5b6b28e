"""A checkpoint's weights and optimizer moments by parameter, whichever ranks and engine wrote it.

    whole = open_whole(folder)
    whole.tensor("model.norm.weight", "exp_avg")    # put together from the shards when asked for

ZeRO keeps each parameter group as one flat vector a rank. Stage 3 cuts every parameter into equal
parts, one a rank, the last one padded; stages 1 and 2 cut the whole vector. The layout is that of
deepspeed.utils.zero_to_fp32 (0.19.8), which reads pickles that may run code; this does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from slap_ds.engine.tensor_files import read_tensors

Key = Literal["fp32", "exp_avg", "exp_avg_sq"]
PREFIX = "lm."  # of the wrapper that the DeepSpeed engine trains


class _Stub:
    """Stands for DeepSpeed's own small classes, whose values are not needed here."""


# By name, so that reading a checkpoint needs no DeepSpeed.
_ALLOWED = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Stub, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Stub, "deepspeed.utils.tensor_fragment.fragment_address"),
]


@dataclass
class WholeState:
    """`tensor(name, key)` is float32 of the parameter's shape, on the CPU."""

    step: float  # optimizer steps taken
    names: list[str]  # trained parameters, under transformers' names
    tensor: Callable[[str, Key], Tensor]
    others: dict[str, Tensor] = field(default_factory=dict)  # buffers and saved frozen weights
    aliases: dict[str, str] = field(default_factory=dict)  # tied parameters: name -> name


def open_whole(folder: Path) -> WholeState:
    """What `Engine.save` of any engine wrote into `folder`.

    Raises:
        FileNotFoundError: `folder` holds no engine state.
        ValueError: a file is damaged or holds more than tensors, or shards are missing.
    """
    if (folder / "torch.pt").is_file():
        return _of_torch(read_tensors(folder / "torch.pt", map_file=True))
    models = _sorted((folder / "engine").glob("*_model_states.pt"))
    optimizers = _sorted((folder / "engine").glob("*_optim_states.pt"))
    if not models:
        raise FileNotFoundError(f"no engine state in {str(folder)!r}")
    model = read_tensors(models[0], _ALLOWED, map_file=True)
    buffers = set(model.get("buffer_names") or ())
    others = {_plain(n): v for n, v in model["module"].items() if not optimizers or n in buffers}
    aliases = {_plain(a): _plain(b) for a, b in (model.get("shared_params") or {}).items()}
    if not optimizers:  # ZeRO 0: the weights stand in the model's file
        return WholeState(0.0, [], _no_tensor, others, aliases)
    shards = [read_tensors(path, _ALLOWED, map_file=True) for path in optimizers]
    parts = [shard["optimizer_state_dict"] for shard in shards]
    count = parts[0]["partition_count"]
    count = max(count) if isinstance(count, list) else count
    if count != len(parts):
        raise ValueError(f"{folder / 'engine'} holds {len(parts)} optimizer shards of {count}")
    frozen = model.get("frozen_param_shapes") or {}
    pieces = [model] + [read_tensors(p, _ALLOWED, map_file=True) for p in models[1:] if frozen]
    for name, shape in frozen.items():
        flat = torch.cat([piece["frozen_param_fragments"][name].flatten() for piece in pieces])
        others[_plain(name)] = flat[: math.prod(shape)].view(shape)
    # Told apart by content: ZeRO-1 that accumulates gradients in float32 names no stage.
    place = _place_stage3 if "fp32_flat_groups" in parts[0] else _place_flat
    spans = place(model["param_shapes"], parts)

    def tensor(name: str, key: Key) -> Tensor:
        shape, take = spans[aliases.get(name, name) if name not in spans else name]
        flat = torch.cat([piece.detach().flatten() for piece in take(key)]).float()
        return flat[: math.prod(shape)].view(shape)

    steps = [entry["step"] for entry in _moments(parts[0]).values() if "step" in entry]
    return WholeState(float(steps[0]) if steps else 0.0, list(spans), tensor, others, aliases)


def whole_weights(folder: Path) -> dict[str, Tensor]:
    """The float32 weights of a checkpoint, under transformers' names, on the CPU.

    Raises:
        FileNotFoundError, ValueError: as `open_whole`.
    """
    whole = open_whole(folder)
    weights = {**whole.others, **{name: whole.tensor(name, "fp32") for name in whole.names}}
    tied = {a: weights[b] for a, b in whole.aliases.items() if b in weights}
    return {**weights, **tied}


_Spans = dict[str, tuple[Sequence[int], Callable[[Key], list[Tensor]]]]


def _place_stage3(shapes: Sequence[Any], parts: Sequence[Any]) -> _Spans:
    """Where each parameter's parts lie: the same span of every rank's flat vectors, laid end to
    end; a span may go over from one flat vector to the next."""
    sizes = [len(flat) for flat in parts[0]["fp32_flat_groups"]]
    spans: _Spans = {}
    offset = 0
    for name, shape in ((n, s) for group in shapes for n, s in group.items()):
        size = -(-math.prod(shape) // len(parts))

        def take(key: Key, start: int = offset, end: int = offset + size) -> list[Tensor]:
            found = []
            for part in parts:
                at = 0
                for flat, length in zip(_flats(part, key), sizes, strict=True):
                    if start < at + length and at < end:
                        found.append(flat[max(start - at, 0) : min(end - at, length)])
                    at += length
            return found

        spans[_plain(name)] = tuple(shape), take
        offset += size
    if offset != sum(sizes):
        raise ValueError(f"the shards hold {sum(sizes)} numbers a rank, the parameters {offset}")
    return spans


def _place_flat(shapes: Sequence[Any], parts: Sequence[Any]) -> _Spans:
    """Stages 1 and 2: group g is one vector, its ranks' parts end to end, padded at its end."""
    spans: _Spans = {}
    paddings = parts[0].get("param_alignment_paddings")
    for g, group in enumerate(shapes):
        offset = 0
        for i, (name, shape) in enumerate(group.items()):
            size = math.prod(shape)

            def take(
                key: Key, g: int = g, start: int = offset, end: int = offset + size
            ) -> list[Tensor]:
                found, at = [], 0
                for part in parts:
                    flat = _flats(part, key)[g]
                    if start < at + len(flat) and at < end:
                        found.append(flat[max(start - at, 0) : min(end - at, len(flat))])
                    at += len(flat)
                return found

            spans[_plain(name)] = tuple(shape), take
            offset += size + (int(paddings[g][i]) if paddings else 0)
    return spans


def _flats(part: Any, key: Key) -> list[Tensor]:
    if key != "fp32":
        moments = _moments(part)
        return [moments[index][key] for index in sorted(moments)]
    flats = part.get("fp32_flat_groups") or part["single_partition_of_fp32_groups"]
    return list(flats)


def _moments(part: Any) -> dict[int, dict[str, Tensor]]:
    inner = part.get("optimizer_state_dict") or part["base_optimizer_state"]
    state: dict[int, dict[str, Tensor]] = inner["state"]
    return state


def _of_torch(state: Any) -> WholeState:
    names: list[str] = state["names"]
    moments = state["optimizer"]["state"]
    model = state["model"]
    index = {name: i for i, name in enumerate(names)}

    def tensor(name: str, key: Key) -> Tensor:
        value: Tensor = model[name] if key == "fp32" else moments[index[name]][key]
        return value.float()

    others = {name: value for name, value in model.items() if name not in index}
    step = float(moments[0]["step"]) if moments else 0.0
    return WholeState(step, names, tensor, others)


def _no_tensor(name: str, key: Key) -> Tensor:
    raise ValueError("a ZeRO 0 checkpoint keeps its optimizer state whole: resume it with ZeRO 0")


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX)


def _sorted(paths: Any) -> list[Path]:
    """By rank: numbers inside names compare as numbers."""
    return sorted(paths, key=lambda p: [int(x) for x in re.findall(r"\d+", p.name)])
