"""Which tokens of a row are trained, as the host knows it.

A row is made on the host, so the host knows where its answers are. Asking a GPU for it again (by
`nonzero`, a maximum, a boolean index) would make the host wait for everything queued so far, at
every chunk of the head: kernels would start late, and ZeRO-3 could not prefetch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slap_ds.device import to_device

Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


class Piece(NamedTuple):
    """c response tokens that meet the head together."""

    tokens: Tensor  # (c,) int64 on the device: their places in the row
    sample: Integers  # (c,) on the host: the sample each is of
    kept: Booleans | None  # (c,) on the host: those that count for the exact diagonal; None: all


@dataclass(frozen=True)
class Response:
    """The R response tokens of a row, on the host."""

    tokens: Integers  # (R,) ascending: their places in the row
    sample: Integers  # (R,) the sample of the row each is of
    kept: Booleans | None = None  # (R,) those that count for the exact diagonal; None: all

    @classmethod
    def of(cls, targets: Tensor, sample: Tensor, kept: Tensor | None = None) -> Response:
        """From (T,) tensors of any device, which is waited for."""
        tokens = (targets >= 0).nonzero()[:, 0].cpu().numpy()
        where = sample.cpu().numpy()
        return cls(tokens, where[tokens], None if kept is None else kept.cpu().numpy()[tokens])

    def pieces(self, chunk_tokens: int, device: torch.device) -> Iterator[Piece]:
        """All of them, `chunk_tokens` at a time."""
        index = to_device(self.tokens, device)
        for start in range(0, len(self.tokens), chunk_tokens):
            here = slice(start, start + chunk_tokens)
            kept = None if self.kept is None else self.kept[here]
            yield Piece(index[here], self.sample[here], kept)
