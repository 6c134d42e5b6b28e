"""The candidate stream: shuffled epochs, one after the other, cut into batches of N.

The sequence of global candidate batches depends on the seed and the number of samples alone,
never on the number of ranks. Its whole state is a cursor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


class CandidateStream:
    """Iterator over global candidate batches of data set indices, each (N,) int64.

    Epoch e is the permutation drawn by a generator seeded with (seed, e); a batch that reaches an
    epoch's end goes on with the next one, so no sample is left out or drawn twice in an epoch.
    With `steps` every batch has N candidates; with `epochs` the last batch may be shorter.

    Raises:
        ValueError: no samples, or not exactly one of `steps` and `epochs`.
    """

    def __init__(
        self,
        samples: int,
        candidates: int,
        seed: int,
        *,
        steps: int | None = None,
        epochs: float | None = None,
    ) -> None:
        if samples < 1:
            raise ValueError("the data set is empty: there is nothing to draw candidates from")
        if (steps is None) == (epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        self.samples = samples
        self.candidates = candidates
        self.seed = seed
        self.total = steps * candidates if steps is not None else math.ceil(samples * (epochs or 0))
        self.cursor = 0
        self._epoch = -1
        self._order: Indices = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Number of batches in the whole stream."""
        return math.ceil(self.total / self.candidates)

    def __iter__(self) -> CandidateStream:
        return self

    def __next__(self) -> Indices:
        end = min(self.cursor + self.candidates, self.total)
        if self.cursor >= end:
            raise StopIteration
        parts = []
        while self.cursor < end:
            epoch, start = divmod(self.cursor, self.samples)
            stop = min(self.samples, start + end - self.cursor)
            parts.append(self._permutation(epoch)[start:stop])
            self.cursor += stop - start
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> Indices:
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order = generator.permutation(self.samples).astype(np.int64)
            self._epoch = epoch
        return self._order

    def state_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "candidates": self.candidates,
            "seed": self.seed,
            "cursor": self.cursor,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the state belongs to another data set, batch size or seed.
        """
        for name in ("samples", "candidates", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the checkpoint's stream has {name} = {state[name]}, this run has "
                    f"{getattr(self, name)}: resume with the data and batch it was saved with"
                )
        self.cursor = int(state["cursor"])
