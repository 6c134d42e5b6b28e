"""Random signs and random subsets that every rank draws alike, from (seed, step) alone.

Nothing here is stored or sent. Signs come from the CPU's generator, so that CPU and CUDA agree;
the subset of tokens is a hash, so that it does not matter which rank holds a token, or in which
row.
"""

from __future__ import annotations

import math
import zlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def signs(seed: int, step: int, name: str, rows: int, columns: int) -> Tensor:
    """(rows, columns) float32 on the CPU, -1 or 1 with equal probability (Rademacher)."""
    generator = torch.Generator().manual_seed(_key(seed, step, name))
    return torch.randint(0, 2, (rows, columns), generator=generator).float() * 2 - 1


def projection(seed: int, name: str, size: int, width: int) -> Tensor:
    """(size, width) float32: random signs / sqrt(size), so that E |P x|^2 = |x|^2.

    Fixed over the run. Inner products are kept as in Johnson and Lindenstrauss's lemma; that signs
    serve as well as Gaussians: Achlioptas 2003.
    """
    return signs(seed, 0, name, size, width) / math.sqrt(size)


@lru_cache(maxsize=1)
def fixed_projection(seed: int, size: int, width: int) -> Tensor:
    """The run's one `projection` of whole sketches, kept because every step needs it."""
    return projection(seed, "sketch", size, width)


def token_subset(seed: int, step: int, position: Tensor, offset: Tensor, share: float) -> Tensor:
    """Which tokens are in a random subset of about `share` of all: (T,) bool.

    Args:
        position: (T,) int64, the token's sample in the candidate batch.
        offset: (T,) int64, its place in the sample.
    """
    # SplitMix64's mixing (Steele et al. 2014, figure 16) of a counter: int64 products wrap around
    # alike everywhere, and shifts are made logical by masks.
    x = (position << 32) + offset + _key(seed, step, "tokens")
    x = x * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    uniform = ((x >> 11) & (2**53 - 1)).double() * 2.0**-53
    return torch.lt(uniform, share)


def _key(seed: int, step: int, name: str) -> int:
    """A 63-bit generator seed of its own for every (seed, step, name)."""
    sequence = np.random.SeedSequence([seed, step, zlib.crc32(name.encode())])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)
