"""Weight files, one at a time: what they hold, their tensors, and new ones of a limited size.

    folder -> find_shards -> look_into (names, shapes) | read (tensors) -> ShardWriter -> folder

safetensors, or .bin files as `torch.save` writes them. A .bin is a pickle, which could run code:
it is loaded with `weights_only=True`, so one that tries is refused.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


def read_json(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError without the file, ValueError for one that is no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: is it a checkpoint folder?")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def find_shards(folder: Path) -> list[Path]:
    """The weight files of a folder, in order.

    Raises:
        FileNotFoundError: there are none, or one that the index names is missing.
    """
    for name in _INDEXES:
        if (folder / name).is_file():
            weight_map = read_json(folder / name).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{folder / name} names no weight file: download it again")
            files = [folder / Path(file).name for file in sorted(set(weight_map.values()))]
            if missing := [file.name for file in files if not file.is_file()]:
                raise FileNotFoundError(
                    f"{folder} lacks {len(missing)} of the {len(files)} weight files that {name} "
                    f"names ({', '.join(missing[:3])}): download them again"
                )
            return files
    for name in _SINGLE:
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(
        f"{folder} has no weights: expected {', '.join(_INDEXES)}, or {' or '.join(_SINGLE)}"
    )


def look_into(shards: list[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, without reading the values of any.

    Raises:
        ValueError: a file cannot be read, a name occurs twice, or a tensor is no floating point.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in shards:
        for name, shape, kind in _entries(path):
            if name in found:
                raise ValueError(f"{path} holds {name} once more: is it from another checkpoint?")
            if kind not in _FLOATS:
                raise ValueError(
                    f"{path}: {name} is {kind}, expected a floating-point type: a quantised "
                    "checkpoint cannot be converted, use the full one"
                )
            found[name] = shape
    return found


def read(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file; only those in use are in memory. Raises as `look_into`."""
    if path.suffix != ".safetensors":
        yield from _load_bin(path).items()
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise _broken(path, error) from None


class ShardWriter:
    """Collects tensors and writes them in files of at most `limit` bytes, or one tensor."""

    def __init__(self, folder: Path, dtype: torch.dtype | None, limit: int) -> None:
        self.folder, self.dtype, self.limit = folder, dtype, limit
        self._names: list[list[str]] = []
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0
        self._bytes: Counter[torch.dtype] = Counter()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take in a tensor; a shard is written once its size is reached."""
        size = tensor.numel() * (self.dtype or tensor.dtype).itemsize
        if self._held_bytes + size > self.limit:
            self._flush()
        # A copy: parts of one tensor, or of a mapped file, would share its memory.
        self._held[name] = tensor.to(self.dtype or tensor.dtype, copy=True).contiguous()
        self._held_bytes += size
        self._bytes[self._held[name].dtype] += size

    def main_dtype(self) -> torch.dtype:
        """That of most bytes so far."""
        return self._bytes.most_common(1)[0][0]

    def close(self) -> None:
        """Write the rest, give the files their names and write the index."""
        self._flush()
        count = len(self._names)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            if count == 1:
                final = "model.safetensors"
            self._part(number).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self._bytes.total()}, "weight_map": weight_map}
            write_json(self.folder / _INDEXES[0], index)

    def _flush(self) -> None:
        if self._held:
            self._names.append(list(self._held))
            save_file(self._held, self._part(len(self._names)), metadata={"format": "pt"})
            self._held, self._held_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"


_FLOATS = {"F16", "BF16", "F32", "F64", *map(str, (torch.float16, torch.bfloat16))}
_FLOATS |= {str(torch.float32), str(torch.float64)}


def _entries(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    if path.suffix != ".safetensors":
        for name, tensor in _load_bin(path).items():
            yield name, tuple(tensor.shape), str(tensor.dtype)
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                yield name, tuple(part.get_shape()), part.get_dtype()
    except SafetensorError as error:
        raise _broken(path, error) from None


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    # Files from before torch 1.6 are no zip archives, and cannot be mapped into memory.
    mapped = zipfile.is_zipfile(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise ValueError(
                f"{path} holds Python objects besides tensors, which could run code when loaded: "
                "refused; use the safetensors files of the checkpoint"
            ) from None
        raise _broken(path, error) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _broken(path, error) from None
    if not isinstance(found, dict) or not all(torch.is_tensor(t) for t in found.values()):
        raise ValueError(f"{path} holds no tensors by name: is it a model's weight file?")
    return found


def _broken(path: Path, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or ["unreadable"])[0]
    return ValueError(f"{path} is truncated or damaged ({reason}): download it again")
