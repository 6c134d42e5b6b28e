"""Packed rows: candidates dealt out over ranks, then laid end to end in rows without padding.

    deal(lengths, world) -> which positions of the candidate batch each rank takes
    pack(samples, row_tokens) -> PackedRow, PackedRow, ...

A row restarts `position_ids` at every sample, which is what keeps samples from seeing each other
in transformers' attention (no attention mask, no cache).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Positions = npt.NDArray[np.int64]
IGNORE = -100


class PackedRow(NamedTuple):
    """One micro-batch: n samples in a row of T tokens.

    A tuple, because DeepSpeed's hooks look for tensors in the inputs of modules.
    """

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, restarting at 0 with every sample
    targets: Tensor  # (T,) int64: the next token where it is trained, else IGNORE
    sample: Tensor  # (T,) int64 in [0, n): which sample of this row a token belongs to
    cu_seqlens: Tensor  # (n + 1,) int32: where samples begin, and T
    weights: Tensor  # (n,) float32: each sample's weight in the loss
    lengths: tuple[int, ...]  # tokens of each sample; (1,) in an empty row
    where: tuple[int, ...]  # (n,) each sample's position in the candidate batch
    response: Positions  # (R,) on the host: the tokens that have a target, ascending
    # Of a part of a row (`part`): token i of a sample here is its token i * ranks + rank.
    rank: int = 0
    ranks: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> PackedRow:
        """The row on another device; the host does not wait for the copies."""
        pinned = device.type == "cuda"  # from pageable memory a copy waits for the stream
        moved: Any = {
            name: (part.pin_memory() if pinned else part).to(device, non_blocking=True)
            for name, part in self._asdict().items()
            if isinstance(part, Tensor)
        }
        return self._replace(**moved)

    @property
    def positions(self) -> Tensor:
        """(n,) int64 on the CPU: `where` as a tensor."""
        return torch.tensor(self.where, dtype=torch.int64)

    @property
    def response_sample(self) -> Positions:
        """(R,) which sample of the row each response token is of."""
        ends = np.cumsum(self.lengths)
        return np.searchsorted(ends, self.response, side="right").astype(np.int64)

    @property
    def response_offset(self) -> Positions:
        """(R,) the place of each response token in its whole sample."""
        begins = np.cumsum((0, *self.lengths))[self.response_sample]
        offset: Positions = (self.response - begins) * self.ranks + self.rank
        return offset

    def part(self, rank: int, ranks: int) -> PackedRow:
        """Every `ranks`-th token of each sample, from token `rank` on, as a row of its own.

        Samples are filled up to a multiple of `ranks` tokens at their end, where causal attention
        lets nobody see them, and train nothing there. So any samples' parts, laid end to end, are
        the part of the row of these samples; and answers, which end samples, meet all ranks alike.
        """
        if ranks == 1:
            return self
        lengths = [-(-n // ranks) for n in self.lengths]
        ends = [0, *itertools.accumulate(lengths)]
        filled = ranks * np.asarray(ends[:-1]) - np.cumsum((0, *self.lengths))[:-1]
        place = np.arange(self.tokens) + np.repeat(filled, self.lengths)  # in the filled-up row
        mine = np.flatnonzero(place % ranks == rank)

        def taken(value: Tensor, fill: int) -> Tensor:
            out = torch.full((ends[-1],), fill, dtype=value.dtype)
            out[torch.from_numpy(place[mine] // ranks)] = value[torch.from_numpy(mine)]
            return out

        response = place[self.response]
        return self._replace(
            input_ids=taken(self.input_ids[0], 0)[None],
            position_ids=taken(self.position_ids[0], 0)[None],
            targets=taken(self.targets, IGNORE),
            sample=taken(self.sample, 0),
            cu_seqlens=torch.tensor(ends, dtype=torch.int32),
            lengths=tuple(lengths),
            response=response[response % ranks == rank] // ranks,
            rank=rank,
            ranks=ranks,
        )

    @staticmethod
    def empty() -> PackedRow:
        """A row without samples: one token that trains nothing.

        Under ZeRO-3 every forward is a collective; a rank that runs out of samples runs this.
        """
        zero = torch.zeros(1, dtype=torch.int64)
        ends = torch.tensor([0, 1], dtype=torch.int32)
        return PackedRow(
            input_ids=zero[None],
            position_ids=zero[None],
            targets=zero + IGNORE,
            sample=zero,
            cu_seqlens=ends,
            weights=torch.zeros(0),
            lengths=(1,),
            where=(),
            response=np.zeros(0, dtype=np.int64),
        )


@dataclass(frozen=True)
class Candidate:
    """A sample on its way into a row."""

    position: int  # in the candidate batch
    ids: npt.NDArray[np.integer]  # (len,) token ids
    mask: npt.NDArray[np.bool_]  # (len,) True where the token is trained
    weight: float = 1.0


def deal(lengths: Sequence[int] | Positions, world: int) -> list[Positions]:
    """Split positions 0..n-1 over `world` ranks so that their token counts balance.

    Longest first, each to the rank with the fewest tokens so far (Graham's LPT rule: the busiest
    rank stays within 4/3 of the optimum). Ties go to the lower position and the lower rank, so
    every rank computes the same split.

    Returns: `world` ascending (n_r,) int64 arrays; a rank's may be empty.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    shares: list[list[int]] = [[] for _ in range(world)]
    load = [(0, rank) for rank in range(world)]
    for position in np.lexsort((np.arange(len(lengths)), -lengths)):
        tokens, rank = heapq.heappop(load)
        shares[rank].append(int(position))
        heapq.heappush(load, (tokens + int(lengths[position]), rank))
    return [np.sort(np.asarray(share, dtype=np.int64)) for share in shares]


def pack(candidates: Sequence[Candidate], row_tokens: int) -> list[PackedRow]:
    """Lay candidates into rows of at most `row_tokens` tokens, first fit, longest first.

    Raises:
        ValueError: a candidate is longer than a row.
    """
    order = sorted(candidates, key=lambda c: (-len(c.ids), c.position))
    if order and len(order[0].ids) > row_tokens:
        raise ValueError(
            f"a sample of {len(order[0].ids)} tokens does not fit into a row of {row_tokens}: "
            "raise batch.micro_batch_tokens or lower data.max_tokens"
        )
    slots = _first_fit([len(candidate.ids) for candidate in order], row_tokens)
    rows: list[list[Candidate]] = [[] for _ in range(max(slots, default=-1) + 1)]
    for slot, candidate in zip(slots, order, strict=True):
        rows[slot].append(candidate)
    return [make_row(sorted(row, key=lambda c: c.position)) for row in rows]


def _first_fit(needs: Sequence[int], room: int) -> list[int]:
    """For each need, in turn, the first of endlessly many rows in which it still fits.

    A tree over the rows holds the most room in each half, so that one is found in log n steps.
    """
    leaves = 1 << max(len(needs) - 1, 0).bit_length()
    most = [room] * (2 * leaves)  # of node i the children are 2 i and 2 i + 1
    slots = []
    for need in needs:
        node = 1
        while node < leaves:
            node *= 2
            node += most[node] < need
        slots.append(node - leaves)
        most[node] -= need
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])
    return slots


def make_row(samples: Sequence[Candidate]) -> PackedRow:
    """One row of `samples` in the given order."""
    targets = []
    for sample in samples:
        # A token is predicted from the one before it; the last token of a sample predicts nothing.
        trained = np.where(sample.mask[1:], sample.ids[1:], IGNORE)
        targets.append(np.append(trained, IGNORE))
    lengths = [len(sample.ids) for sample in samples]
    flat = np.concatenate(targets)
    return PackedRow(
        input_ids=_int64(np.concatenate([s.ids for s in samples]))[None],
        position_ids=_int64(np.concatenate([np.arange(n) for n in lengths]))[None],
        targets=_int64(flat),
        sample=_int64(np.repeat(np.arange(len(samples)), lengths)),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        weights=torch.tensor([s.weight for s in samples], dtype=torch.float32),
        lengths=tuple(lengths),
        where=tuple(s.position for s in samples),
        response=(flat != IGNORE).nonzero()[0],
    )


def _int64(array: npt.NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
