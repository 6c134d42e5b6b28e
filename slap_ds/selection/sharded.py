"""Farthest points over ranks: each keeps the sketches of its own candidates, all get the picks.

    hold(this rank's sketches) -> Shard        twins take the first one's, broken ones are told
    shard.stand_in(batch)      -> ScoredBatch  positions in place of sketches
    shard.farthest_point(...)  -> the picks of `ops.farthest_point`, bit for bit

One pick a message would cost M messages. A round works on a pool instead: every rank offers its few
farthest candidates (distance and position), the best of all offers are the pool, their sketches are
shared, and each rank computes some rows of their distances to each other. Every rank then picks
inside the pool until its best is beaten by the best candidate outside it, and shrinks the distances
of its own candidates. Inside a pool the greedy picks are those of the whole: distances only fall,
so nothing outside can overtake the best that was left there. A distance is computed by the op, of
the same two rows wherever that is, so that how many ranks there are changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slap_ds.ops import FarthestPoints, nearest_squared
from slap_ds.ops.plan import OVERFLOW_LIMIT
from slap_ds.selection.base import ScoredBatch

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

SHARDED = frozenset({"slap", "k_center"})  # the methods whose only use of sketches is this one
_LEAST = 32  # candidates of the first rounds, in which one pick shrinks many distances
_EXACT = 2**24  # float32 counts no further


class Line(Protocol):
    """What ranks tell each other here; `comm.Comm` is one."""

    rank: int
    world: int

    def exchange(self, step: int, phase: str, values: Sequence[int]) -> Int64:
        """All-gather the same count of integers: (world, count) int64."""
        ...

    def add_rows(self, phase: str, rows: Tensor) -> Tensor:
        """(p, D) float32, each row zero on all ranks but one -> that rank's rows, bit for bit."""
        ...


@dataclass
class Shard:
    """This rank's candidates in a batch of N."""

    line: Line
    step: int
    mine: Tensor  # (n,) int64, ascending positions of this rank's candidates
    rows: Tensor  # (n, D) float32, their sketches
    usable: Tensor  # (N,) bool, the same on every rank: whose sketch is finite
    rounds: int = 0  # of all calls

    @property
    def pool(self) -> int:
        """Most candidates of a round: the more there are in all, the fewer rounds of more each."""
        return min(1024, max(128, len(self.usable) // 32))

    def stand_in(self, batch: ScoredBatch) -> ScoredBatch:
        """The batch with positions (N, 1) for sketches, and no loss where a sketch is broken."""
        loss = batch.loss.cpu()
        return replace(
            batch,
            loss=torch.where(self.usable, loss, torch.nan),
            sketch=torch.arange(len(loss), dtype=torch.float32)[:, None],
        )

    def farthest_point(
        self,
        features: Tensor,
        budgets: Tensor,
        strata: Tensor | None = None,
        *,
        first: int,
        across_strata: bool = True,
        groups: Tensor | None = None,
        quotas: Tensor | None = None,
    ) -> FarthestPoints:
        """`ops.farthest_point` of candidates whose `features` are the positions of `stand_in`.

        Every rank calls it with the same arguments. `distance` is NaN for others' candidates.
        """
        n, device = len(features), self.rows.device
        positions = features[:, 0].long()
        held = torch.isin(positions, self.mine)
        local = held.nonzero()[:, 0]  # of this call's candidates, those this rank holds
        row_of = torch.searchsorted(self.mine, positions[local]).to(device)
        rows = self.rows[row_of]
        squared = torch.full((len(local),), math.inf)
        of = torch.zeros(n, dtype=torch.int64) if strata is None else strata.cpu()
        group = torch.zeros(n, dtype=torch.int64) if groups is None else groups.cpu()
        room = [n] if quotas is None else quotas.tolist()
        left, m = budgets.tolist(), int(budgets.sum())

        unpicked = torch.ones(n, dtype=torch.bool)
        picks: list[int] = []
        at: list[float] = []
        pool = _Pool(np.empty(0, dtype=np.int64), torch.empty(0, rows.shape[1], device=device))
        stratum, size = 0, _LEAST
        while len(picks) < m:
            members, current, beyond = np.array([first]), np.array([math.inf]), (-1.0, 0)
            if left[stratum] and (picks or int(of[first]) != stratum):
                mine_open = unpicked[local] & (of[local] == stratum)
                mine_open &= (torch.tensor(room) > 0)[group[local]]
                members, current, beyond = self._offer(local[mine_open], squared[mine_open], size)
            if left[stratum] == 0 or not len(members):
                spare, left[stratum] = left[stratum], 0
                stratum = (stratum + 1) % len(left)
                left[stratum] += spare
                continue
            pool = self._share(pool, members, local, rows)
            pair = np.zeros((1, 1), np.float32) if len(members) == 1 else self._pairs(pool.rows)
            new, new_at = _greedy(pool.members, pair, current, beyond, group, room, left[stratum])
            picks += pool.members[new].tolist()
            at += new_at
            left[stratum] -= len(new)
            unpicked[pool.members[new]] = False
            size = min(max(4 * len(new), _LEAST), self.pool)
            self._shrink(squared, rows, pool.rows[new], unpicked, local, of, stratum, across_strata)
            self.rounds += 1
        distance = torch.full((n,), math.nan)
        distance[local] = torch.where(unpicked[local], squared.sqrt(), 0.0)
        return FarthestPoints(torch.tensor(picks), torch.tensor(at), distance)

    def _offer(
        self, candidates: Tensor, squared: Tensor, size: int
    ) -> tuple[Int64, Float32, tuple[float, int]]:
        """The pool (ascending) with its distances, and the key of the best candidate outside it.

        A rank offers a few more than its part of the pool. The first one it keeps back counts as
        outside, so that the result does not depend on how the farthest lie over the ranks.
        """
        count = min(size, 2 + math.ceil(2 * size / self.line.world))
        index, value = candidates.numpy(), squared.numpy()
        order = np.lexsort((index, -value))[: count + 1]
        values = np.full(2 * (count + 1), -1, dtype=np.int64)
        values[: len(order)] = index[order]
        values[count + 1 : count + 1 + len(order)] = value[order].view(np.int32)
        table = self.line.exchange(self.step, "farthest: offers", values.tolist())
        all_index = table[:, : count + 1]
        all_value = table[:, count + 1 :].astype(np.int32).view(np.float32)
        offered = all_index >= 0
        outside = np.zeros_like(offered)
        outside[:, count] = offered[:, count]
        inside = offered & ~outside
        index, value = all_index[inside], all_value[inside]
        order = np.lexsort((index, -value))
        rest_index = np.concatenate([index[order[size : size + 1]], all_index[outside]])
        rest_value = np.concatenate([value[order[size : size + 1]], all_value[outside]])
        beyond = (-1.0, 0)
        if len(rest_index):
            beyond = max(zip(rest_value.tolist(), (-rest_index).tolist(), strict=True))
        chosen = order[:size]
        chosen = chosen[np.argsort(index[chosen])]
        return index[chosen], value[chosen], beyond

    def _share(self, pool: _Pool, members: Int64, local: Tensor, rows: Tensor) -> _Pool:
        """The rows of `members`: those of the last pool are here already, the others are sent."""
        known = np.isin(members, pool.members)
        out = rows.new_zeros(len(members), rows.shape[1])
        place = torch.from_numpy(members)
        ours = torch.isin(place, local)
        out[ours.to(out.device)] = rows[torch.searchsorted(local, place[ours]).to(out.device)]
        fresh = torch.from_numpy(~known).to(out.device)
        if not known.all():
            out[fresh] = self.line.add_rows("farthest: rows", out[fresh])
        if known.any():
            old = torch.from_numpy(np.searchsorted(pool.members, members[known])).to(out.device)
            out[~fresh] = pool.rows[old]
        return _Pool(members, out)

    def _pairs(self, rows: Tensor) -> Float32:
        """(p, p) float32 squared distances inside a pool, every row of them from one rank."""
        pair = rows.new_zeros(len(rows), len(rows))
        for i in range(self.line.rank, len(rows), self.line.world):
            pair[i] = nearest_squared(rows, rows[i : i + 1])
        whole: Float32 = self.line.add_rows("farthest: pairs", pair).cpu().numpy()
        return whole

    def _shrink(
        self,
        squared: Tensor,
        rows: Tensor,
        new: Tensor,
        unpicked: Tensor,
        local: Tensor,
        of: Tensor,
        stratum: int,
        across_strata: bool,
    ) -> None:
        reached = unpicked[local]
        if not across_strata:
            reached = reached & (of[local] == stratum)
        if bool(reached.any()):
            nearest = nearest_squared(rows[reached.to(rows.device)], new).cpu()
            squared[reached] = torch.minimum(squared[reached], nearest)


@dataclass(frozen=True)
class _Pool:
    members: Int64  # (p,) int64, ascending, indices into the call's candidates
    rows: Tensor  # (p, D)


def hold(
    line: Line, step: int, positions: Tensor, sketch: Tensor, first: Tensor, holder: Tensor
) -> Shard:
    """This rank's share of a batch, ready for selection.

    Args:
        positions: (n,) int64, of this rank's candidates, in any order.
        sketch: (n, D) float32, their sketches.
        first: (N,) int64: the first candidate of equal content; all twins get its sketch.
        holder: (N,) int64, the rank of each candidate.

    Raises:
        ValueError: sketches so large that a squared distance could overflow.
    """
    if len(first) > _EXACT:
        raise ValueError(
            f"selection.where sharded takes at most {_EXACT} candidates a step, found {len(first)}"
        )
    mine, order = positions.sort()
    rows = sketch.float()[order.to(sketch.device)]
    wanted = first[holder[first] != holder].unique()  # by a rank that does not hold them
    if len(wanted):
        sent = rows.new_zeros(len(wanted), rows.shape[1])
        ours = torch.isin(wanted, mine)
        place = torch.searchsorted(mine, wanted[ours]).to(rows.device)
        sent[ours.to(rows.device)] = rows[place]
        sent = line.add_rows("farthest: twins", sent)
    source = first[mine]
    here = torch.isin(source, mine)
    out = rows.clone()
    near = here.to(rows.device)
    out[near] = rows[torch.searchsorted(mine, source[here]).to(rows.device)]
    if not bool(here.all()):
        out[~near] = sent[torch.searchsorted(wanted, source[~here]).to(rows.device)]
    return Shard(line, step, mine, out, _usable(line, step, mine, out, len(first)))


def _usable(line: Line, step: int, mine: Tensor, rows: Tensor, n: int) -> Tensor:
    """(N,) bool: whose sketch is finite, agreed on by all ranks."""
    finite = torch.isfinite(rows).all(1)
    broken = mine[~finite.cpu()]
    largest = float(rows[finite].abs().max()) if bool(finite.any()) else 0.0
    bits = int(np.float64(largest).view(np.int64))
    table = line.exchange(step, "farthest: broken sketches", [len(broken), bits])
    # No two points are farther apart than the corners of a box that holds them all.
    largest = float(np.ascontiguousarray(table[:, 1]).view(np.float64).max())
    if rows.shape[1] * (2 * largest) ** 2 > OVERFLOW_LIMIT:
        raise ValueError(
            f"the largest number in a sketch is {largest:.3g}: a squared distance could overflow "
            "float32; lower optimizer.lr, or set scoring.sketch_norm unit"
        )
    usable = torch.ones(n, dtype=torch.bool)
    most = int(table[:, 0].max())
    if most:
        padded = np.full(most, -1, dtype=np.int64)
        padded[: len(broken)] = broken.numpy()
        told = line.exchange(step, "farthest: which are broken", padded.tolist())
        usable[torch.from_numpy(told[told >= 0])] = False
    return usable


def _greedy(
    members: Int64,
    pair: Float32,
    current: Float32,
    beyond: tuple[float, int],
    group: Tensor,
    room: list[int],  # lowered here, a group's picks left
    most: int,
) -> tuple[list[int], list[float]]:
    """Picks inside the pool (places in it) until it is beaten from outside or a group is full."""
    current = current.astype(np.float32)
    index, groups = members.tolist(), group[torch.from_numpy(members)].tolist()
    new: list[int] = []
    at: list[float] = []
    while True:
        best = int(current.argmax())  # ascending members: the lowest index of equals
        if new and (float(current[best]), -index[best]) < beyond:
            break
        new.append(best)
        at.append(float(current[best]))
        room[groups[best]] -= 1
        if room[groups[best]] == 0 or len(new) == min(most, len(index)):
            break
        current = np.minimum(current, pair[best])
        current[new] = -1.0
    return new, at
