"""A memory-mapped store of tokens, as `build` makes it and trainers read it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slap_ds.data.counts import Counts

STORE_VERSION = 4
POSITION_BITS = 28
LABELS = ("task", "source", "lang")
COLUMNS = {
    "lengths": "<i8",
    "trained_tokens": "<i8",
    "content": "<i8",
    "task": "<i4",
    "source": "<i4",
    "lang": "<i4",
}
# Where each sample came from; not part of the fingerprint, for files may be moved.
ORIGIN = {"file": "<i4", "line": "<i8"}

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sample:
    """One stored sample; ids are a copy (the file may hold 16 bits a token), mask is a view."""

    ids: Int32  # (len,) token ids
    mask: npt.NDArray[np.bool_]  # (len,) True where the token is trained


class TokenStore:
    """n tokenised samples, memory-mapped and read-only. Made by `build_store`.

    Attributes:
        folder: where it lies.
        fingerprint: sha256 (hex) of the stored tokens, masks and labels.
        lengths, trained_tokens: (n,) int64, tokens of each sample and those predicted with loss.
        content: (n,) int64 >= 0, 63-bit hash of ids and mask: equal where samples are equal.
        sample_ids: (n,) int64 >= 0, 35 bits of `content` << 28 | position in the store.
        task, source, lang: (n,) int32 codes into `names["task"]`, ...
        file, line: (n,) int32 number of the source, in their order from 0, and int64 number of the
            row in it, as rejects.jsonl counts them: what a sample was made of.
        counts: what became of the rows.

    Raises ValueError where the folder holds no whole store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
            sizes: dict[str, int] = manifest["sizes"]
            for name, size in sizes.items():
                found = (folder / name).stat().st_size
                if found != size:
                    raise ValueError(f"{name} has {found} bytes, the manifest says {size}")
            self.fingerprint: str = manifest["fingerprint"]
            self.names: dict[str, list[str]] = manifest["names"]
            self.counts = Counts(**manifest["counts"])
            self._ids = _map(folder / "tokens.bin", manifest["token_type"])
            self._mask = _map(folder / "mask.bin", "?")
            kinds = {**COLUMNS, **ORIGIN}
            columns = {name: _map(folder / f"{name}.bin", kind) for name, kind in kinds.items()}
            if not columns["lengths"].sum() == len(self._ids) == len(self._mask):
                raise ValueError("the lengths do not add up to the tokens stored")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder}: no whole token store: {error}") from error
        self.lengths: Int64 = columns["lengths"]
        self.trained_tokens: Int64 = columns["trained_tokens"]
        self.content: Int64 = columns["content"]
        self.task: Int32 = columns["task"]
        self.source: Int32 = columns["source"]
        self.lang: Int32 = columns["lang"]
        self.file: Int32 = columns["file"]
        self.line: Int64 = columns["line"]
        positions = np.arange(len(self.lengths), dtype=np.int64)
        self.sample_ids: Int64 = (self.content >> POSITION_BITS << POSITION_BITS) | positions
        self._ends: Int64 = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a store of {len(self)}")
        end = int(self._ends[index])
        span = slice(end - int(self.lengths[index]), end)
        return Sample(self._ids[span].astype(np.int32), self._mask[span])


def _map(path: Path, kind: str) -> Any:
    if path.stat().st_size == 0:  # which mmap refuses
        return np.empty(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")
