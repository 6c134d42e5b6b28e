"""What a run remembers beside its engine, as two files: JSON values, and tensors to the bit.

{"scorer": {"updates": 3, "average": Tensor}}
    -> state.json          {"scorer": {"updates": 3}}
    -> state.safetensors   scorer.average
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from slap_ds import jsonl

VALUES, TENSORS = "state.json", "state.safetensors"


def packed(state: Mapping[str, Any]) -> dict[str, bytes]:
    """The files' contents by name, as `state` is now.

    Args:
        state: nested mappings of JSON values and tensors; keys without dots.

    Raises:
        ValueError: a number that JSON has not.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in _tensors(state)}
    return {VALUES: jsonl.dumps(_values(state)).encode(), TENSORS: save(tensors)}


def unpacked(folder: Path) -> dict[str, Any]:
    """The state in the files of `folder`, its tensors on the CPU.

    Raises:
        ValueError: a file is damaged.
    """
    state: dict[str, Any] = jsonl.loads((folder / VALUES).read_bytes())
    try:
        tensors = load((folder / TENSORS).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is refused, it is damaged: {error}") from None
    for path, tensor in tensors.items():
        *parents, last = path.split(".")
        place = state
        for name in parents:
            place = place[name]
        place[last] = tensor
    return state


def _tensors(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        assert "." not in name
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.")


def _values(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _values(value) if isinstance(value, Mapping) else value
        for name, value in state.items()
        if not isinstance(value, Tensor)
    }
