"""A candidate batch: N samples of the store, and the rows made of any of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slap_ds.data.packing import Candidate, PackedRow, Positions, pack
from slap_ds.data.store import TokenStore


@dataclass(frozen=True)
class CandidateBatch:
    """The candidates of one step; every rank holds the whole list and can read every sample."""

    store: TokenStore
    indices: Positions  # (N,) int64, into the store

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of each candidate."""
        lengths: npt.NDArray[np.int64] = self.store.lengths[self.indices]
        return lengths

    @property
    def response_tokens(self) -> npt.NDArray[np.int64]:
        """(N,) trained tokens of each candidate."""
        trained: npt.NDArray[np.int64] = self.store.trained_tokens[self.indices]
        return trained

    @property
    def sample_ids(self) -> npt.NDArray[np.int64]:
        """(N,) stable ids."""
        ids: npt.NDArray[np.int64] = self.store.sample_ids[self.indices]
        return ids

    @property
    def content(self) -> Tensor:
        """(N,) int64, equal where samples are equal token for token."""
        return torch.from_numpy(np.asarray(self.store.content[self.indices], dtype=np.int64))

    def rows(
        self, positions: Sequence[int] | Positions, row_tokens: int, weights: Sequence[float] = ()
    ) -> list[PackedRow]:
        """The candidates at `positions`, packed; weights default to 1."""
        picked = []
        for i, position in enumerate(positions):
            sample = self.store[int(self.indices[int(position)])]
            weight = float(weights[i]) if len(weights) else 1.0
            picked.append(Candidate(int(position), sample.ids, sample.mask, weight))
        return pack(picked, row_tokens)
