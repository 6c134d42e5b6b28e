"""What the ranks tell each other: scores in, picks out, and proof that they agree.

    gather(local scores) -> scores of the whole candidate batch, in candidate order, on every rank
    broadcast_picks(selection of rank 0) -> the same selection on every rank, hash compared

Every exchange carries a stamp of step and phase. torch pairs collectives by order alone: a rank
that skips one would go on, one step behind, without an error. The stamp makes that an error that
names the ranks. On one rank everything here is the identity.
"""

from __future__ import annotations

import hashlib
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from slap_ds.compat import all_gather_flat
from slap_ds.device import to_device
from slap_ds.distributed.heart import Heart
from slap_ds.distributed.peers import Peers
from slap_ds.scoring import Scores
from slap_ds.selection import Selection


class RankDisagreement(RuntimeError):
    """Ranks hold different values where they must hold the same, or are at different steps."""


@dataclass
class Comm:
    """This rank's line to the others. `device` is where collectives run (CPU for gloo)."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sharing: int = 1  # engine.sequence_parallel: so many ranks in a row make up a group
    # Collectives by phase: how many, and the bytes of payload this rank has put into them.
    traffic: dict[str, list[int]] = field(default_factory=dict)
    peers: Peers = field(default_factory=Peers)
    heart: Heart = field(default_factory=Heart)
    waited_s: float = 0.0  # in exchanges, for ranks that came later

    @property
    def groups(self) -> int:
        """How many groups there are: candidates and rows are dealt out to groups."""
        return self.world // self.sharing

    @property
    def group(self) -> int:
        """The group that this rank belongs to."""
        return self.rank // self.sharing

    @property
    def bytes_sent(self) -> int:
        """Payload this rank has put into collectives so far."""
        return sum(size for _, size in self.traffic.values())

    def watch(self, towards: str) -> None:
        """Make the ranks answer each other, so that `blame` can name one that has gone.

        Args:
            towards: name or address of rank 0's node.
        """
        self.peers = Peers.open(
            self.rank, towards, lambda values: self.exchange(-1, "hosts", values), self.heart
        )

    def blame(self, error: BaseException) -> str | None:
        """Who is behind a failed collective, in words; None: nobody, or it is another error."""
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            return None
        silent = self.peers.silent()
        if not silent:
            return None
        return f"{self.peers.gone(silent)} ({_cause(error)})"

    def exchange(self, step: int, phase: str, values: Sequence[int]) -> npt.NDArray[np.int64]:
        """All-gather a few integers: returns (world, len(values)) int64.

        Raises:
            RankDisagreement: some rank is at another step or phase.
        """
        self.heart.beat(phase, step)
        if self.world > 1 and self.device.type == "cuda":  # its backlog is this rank's own work
            torch.cuda.synchronize()
        started = time.perf_counter()
        mine = torch.tensor([step, _code(phase), *values], dtype=torch.int64)
        table: npt.NDArray[np.int64] = self._all_gather(mine, phase).numpy()
        self.waited_s += time.perf_counter() - started
        self._check_stamps(table[:, :2], step, phase)
        return table[:, 2:]

    def agree(self, step: int, phase: str, text: str) -> None:
        """Check that every rank holds the same `text` (a hash, a fingerprint).

        Raises:
            RankDisagreement: naming the ranks that differ from rank 0.
        """
        digest = hashlib.sha256(text.encode()).digest()[:8]
        seen = self.exchange(step, phase, [int.from_bytes(digest, "little", signed=True)])[:, 0]
        if (odd := (seen != seen[0]).nonzero()[0]).size:
            raise RankDisagreement(
                f"step {step}: {phase} differs between rank 0 and ranks {odd.tolist()}; they must "
                "be the same on every rank"
            )

    def texts(self, step: int, phase: str, text: str) -> list[str]:
        """Every rank's text, in rank order."""
        data = text.encode()
        longest = int(self.exchange(step, f"{phase}: lengths", [len(data)]).max())
        padded = data.ljust(-(-max(longest, 1) // 8) * 8, b"\0")
        table = self.exchange(step, phase, np.frombuffer(padded, dtype=np.int64).tolist())
        return [row.tobytes().rstrip(b"\0").decode() for row in np.ascontiguousarray(table)]

    def barrier(self, step: int, phase: str) -> None:
        """Wait for all ranks."""
        self.exchange(step, phase, [])

    def sum(self, step: int, phase: str, values: Sequence[float]) -> list[float]:
        """Sum of each value over the ranks, in float64, added in rank order on every rank."""
        bits = np.asarray(values, dtype=np.float64).view(np.int64).tolist()
        table = self.exchange(step, phase, bits)
        return [float(x) for x in np.ascontiguousarray(table).view(np.float64).sum(0)]

    def gather(self, step: int, local: Scores, candidates: int) -> Scores:
        """Scores of all `candidates` N candidates, in candidate order, the same on every rank.

        Payloads are bytes in one collective: losses stay float32 and positions int64, exactly.

        Args:
            local: this group's share, the same on each of its ranks, which send a part of it each;
                `positions` of all groups together are 0..N-1.

        Raises:
            RankDisagreement: a rank is at another step, or the shares do not make up the batch.
        """
        local = _part(local, self.rank % self.sharing, self.sharing)
        mine = [len(local.positions), local.diagonal_tokens]
        told = self.exchange(step, "gather sizes", mine).tolist()
        if self.world == 1:
            return _in_order(step, [local], candidates)
        width = -(-max(_bytes(local, n) for n, _ in told) // 8) * 8  # rows begin at whole numbers
        payload = torch.zeros(width, dtype=torch.uint8, device=local.loss.device)
        _pack(local, payload)
        table = self._all_gather(payload, "gather")
        rows = zip(table, told, strict=True)
        return _in_order(step, [_unpack(row, local, *sizes) for row, sizes in rows], candidates)

    def broadcast_picks(self, step: int, selection: Selection | None) -> Selection:
        """Rank 0's selection, on every rank; the others pass None.

        Raises:
            RankDisagreement: the ranks do not hold the same picks afterwards.
        """
        if self.world == 1:
            assert selection is not None
            return selection
        size = self.exchange(step, "picks", [0 if selection is None else len(selection.picks)])
        count = int(size[0, 0])
        payload = torch.empty(count * 12, dtype=torch.uint8)
        if selection is not None:
            picks, weights = selection.picks.contiguous(), selection.weights.contiguous()
            payload = torch.cat([picks.view(torch.uint8), weights.view(torch.uint8)])
        payload = payload.to(self.device)
        dist.broadcast(payload, src=0)
        payload = payload.cpu()
        self._count("broadcast of picks", payload)
        received = Selection(
            picks=_as(payload[: count * 8], torch.int64),
            weights=_as(payload[count * 8 :], torch.float32),
            stats={} if selection is None else selection.stats,
        )
        return self.agree_picks(step, received)

    def agree_picks(self, step: int, selection: Selection) -> Selection:
        """Check that every rank holds these picks and weights, and return them.

        Raises:
            RankDisagreement: naming the ranks that do not.
        """
        if self.world > 1:
            digest = hashlib.sha256(selection.picks.numpy().tobytes())
            digest.update(selection.weights.numpy().tobytes())
            self.agree(step, "the hash of the picks", digest.hexdigest())
        return selection

    def time_all_reduce(self, size: int, repeats: int) -> list[float]:
        """Seconds of each of `repeats` all-reduces of `size` bytes, after two that do not count."""
        data = torch.zeros(size // 4, device=self.device)
        took = []
        for _ in range(repeats + 2):
            start = time.perf_counter()
            if self.world > 1:
                dist.all_reduce(data)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            took.append(time.perf_counter() - start)
        return took[2:]

    def _all_gather(self, mine: Tensor, phase: str) -> Tensor:
        """(n,) -> (world, n), on the CPU for CPU tensors and on `device` otherwise."""
        if self.world == 1:
            return mine[None]
        sent = mine.to(self.device)
        table = torch.empty(self.world, *sent.shape, dtype=sent.dtype, device=self.device)
        all_gather_flat(table.view(-1), sent)
        self._count(phase, sent)
        return table.to(mine.device)

    def _count(self, phase: str, payload: Tensor) -> None:
        count = self.traffic.setdefault(phase, [0, 0])
        count[0] += 1
        count[1] += payload.numel() * payload.element_size()

    def _check_stamps(self, stamps: npt.NDArray[np.int64], step: int, phase: str) -> None:
        odd = (stamps != stamps[self.rank]).any(1).nonzero()[0]
        if odd.size:
            where = ", ".join(f"rank {r} at step {stamps[r, 0]}" for r in odd)
            raise RankDisagreement(
                f"rank {self.rank} is at step {step}, {phase!r}, but {where} or in another phase: "
                "a collective was skipped or reordered"
            )


def _cause(error: BaseException) -> str:
    """A collective's error without the place in the library where it was raised."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\]\s*", "", first)[:200]


def _code(phase: str) -> int:
    return zlib.crc32(phase.encode())


def _in_order(step: int, shares: Sequence[Scores], candidates: int) -> Scores:
    """The whole batch in candidate order; the sketches, which are large, are copied once, and not
    at all where one share has them so already."""
    positions = torch.cat([share.positions for share in shares]).cpu()
    if not torch.equal(positions.sort().values, torch.arange(candidates)):
        raise RankDisagreement(
            f"step {step}: the gathered shares hold {len(positions)} candidates "
            f"({[len(share.positions) for share in shares]} by rank), not each of the "
            f"{candidates} once"
        )
    alone = len(shares) == 1 and torch.equal(positions, torch.arange(candidates))

    def placed(field: str, dtype: torch.dtype | None = None) -> Any:
        """(N, ...): each share's rows at their positions."""
        parts = [getattr(share, field) for share in shares]
        if parts[0] is None or alone:
            return parts[0] if dtype is None or parts[0] is None else parts[0].to(dtype)
        whole = parts[0].new_empty((candidates, *parts[0].shape[1:]), dtype=dtype)
        for share, part in zip(shares, parts, strict=True):
            whole[to_device(share.positions, part.device)] = part.to(dtype or part.dtype)
        return whole

    diagonals = [share.diagonal.float() for share in shares if share.diagonal is not None]
    return Scores(
        positions=torch.arange(candidates),
        loss=placed("loss", torch.float32),
        tokens=placed("tokens"),
        gradient=placed("gradient"),
        diagonal=torch.stack(diagonals).double().sum(0) if diagonals else None,
        diagonal_tokens=sum(share.diagonal_tokens for share in shares),
        extras=placed("extras", torch.float32),
    )


def _part(scores: Scores, rank: int, ranks: int) -> Scores:
    """What one of the ranks that hold the same share sends of it: samples and sums once."""
    if ranks == 1:
        return scores

    def every(values: Any) -> Any:
        return None if values is None else values[rank::ranks]

    diagonal = scores.diagonal
    return Scores(
        positions=every(scores.positions),
        loss=every(scores.loss),
        tokens=every(scores.tokens),
        gradient=every(scores.gradient),
        diagonal=torch.zeros_like(diagonal) if rank and diagonal is not None else diagonal,
        diagonal_tokens=0 if rank else scores.diagonal_tokens,
        extras=every(scores.extras),
    )


def _pack(scores: Scores, into: Tensor) -> None:
    """Write a rank's share into bytes: 8-byte numbers first, the sketch in the dtype it has."""
    parts = [scores.positions, scores.tokens, scores.loss.float()]
    parts += [p.float() for p in (scores.diagonal, scores.extras) if p is not None]
    parts += [scores.gradient] if scores.gradient is not None else []
    begin = 0
    for part in parts:
        end = begin + part.numel() * part.element_size()
        into[begin:end].view(part.dtype).copy_(part.reshape(-1))
        begin = end


def _sizes(like: Scores, n: int) -> list[int]:
    """Bytes of each field of a share of n candidates, in `_pack`'s order."""
    sketch = 0
    if like.gradient is not None:
        sketch = like.gradient.shape[1] * like.gradient.element_size()
    diagonal = 0 if like.diagonal is None else 4 * len(like.diagonal)
    extras = 0 if like.extras is None else 4 * like.extras.shape[1]
    return [8 * n, 8 * n, 4 * n, diagonal, extras * n, sketch * n]


def _bytes(like: Scores, n: int) -> int:
    return sum(_sizes(like, n))


def _unpack(row: Tensor, like: Scores, n: int, diagonal_tokens: int) -> Scores:
    """Undo `_pack` for a rank's row with n candidates: views of it, nothing is copied."""
    parts = row[: _bytes(like, n)].split(_sizes(like, n))
    positions, tokens, loss, diagonal, side, sketch = parts
    gradient, extras = None, None
    if like.extras is not None:
        extras = side.view(torch.float32).view(n, like.extras.shape[1])
    if like.gradient is not None:
        gradient = sketch.view(like.gradient.dtype).view(n, like.gradient.shape[1])
    return Scores(
        positions=positions.view(torch.int64),
        loss=loss.view(torch.float32),
        tokens=tokens.view(torch.int64),
        gradient=gradient,
        diagonal=None if like.diagonal is None else diagonal.view(torch.float32),
        diagonal_tokens=diagonal_tokens,
        extras=extras,
    )


def _as(data: Tensor, dtype: torch.dtype) -> Tensor:
    # A view needs its offset aligned to the new dtype; a copy always is.
    return data.clone().view(dtype)
