"""One scoring pass over a store on the current weights: the loss of every sample, or every turn.

    indices -> chunks -> dealt over ranks -> packed rows -> engine.score -> gathered, in order

All ranks call these functions and get the same values. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from slap_ds.data.batch import CandidateBatch
from slap_ds.data.packing import Candidate, PackedRow, Positions, deal, pack
from slap_ds.data.store import Sample, TokenStore
from slap_ds.distributed.comm import Comm
from slap_ds.engine import Engine
from slap_ds.scoring import ScoreRequest, Scores

CHUNK = 4096  # samples whose rows lie in memory at once

Floats = npt.NDArray[np.float64]


class TurnLosses(NamedTuple):
    """Every assistant turn of some samples, in their order; t turns in all."""

    sample: Positions  # (t,) int64, index into the store
    turn: Positions  # (t,) int64, 0 is a sample's first assistant turn
    loss: Floats  # (t,) nats, summed over the turn's response tokens
    tokens: Positions  # (t,) int64, response tokens


def score_pass(
    engine: Engine, comm: Comm, store: TokenStore, row_tokens: int
) -> tuple[Positions, Floats]:
    """Mean loss of every sample of the store.

    Returns: sample ids (n,) int64 and losses (n,) float64, nats per response token, both in the
    store's order. A loss is NaN or infinite where the model's is.
    """
    loss, tokens = sum_pass(engine, comm, store, np.arange(len(store)), row_tokens)
    return store.sample_ids, loss / tokens


def sum_pass(
    engine: Engine,
    comm: Comm,
    store: TokenStore,
    indices: Positions,
    row_tokens: int,
    step: int = -1,
) -> tuple[Floats, Positions]:
    """Loss sums (n,) float64 in nats and response tokens (n,) int64 of the samples at `indices`."""
    parts = []
    for batch, share in _shares(comm, store, indices):
        rows = batch.rows(share, row_tokens)
        parts.append(_score(engine, comm, rows, len(batch), step))
    return _joined(parts)


def rows_pass(
    engine: Engine, comm: Comm, samples: Sequence[Sample], row_tokens: int
) -> tuple[Floats, Positions]:
    """As `sum_pass`, of samples that need not be in a store."""
    parts = []
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        share = deal([len(sample.ids) for sample in chunk], comm.groups)[comm.group]
        mine = [Candidate(int(i), chunk[i].ids, chunk[i].mask) for i in share]
        parts.append(_score(engine, comm, pack(mine, row_tokens), len(chunk), step=-1))
    return _joined(parts)


def turn_pass(
    engine: Engine, comm: Comm, store: TokenStore, indices: Positions, row_tokens: int
) -> TurnLosses:
    """The loss of every assistant turn, each given all that stands before it.

    A turn is a run of trained tokens: an answer with its stop token. One forward serves all turns
    of a sample, because the head adds up token losses by turn instead of by sample.
    """
    parts, sample, turn = [], [], []
    for batch, share in _shares(comm, store, indices):
        turns = [_turns(store[int(i)].mask) for i in batch.indices]
        counts = np.array([int(t[-1]) + 1 for t in turns])
        starts = np.cumsum(counts) - counts
        rows = [_by_turn(row, turns, starts) for row in batch.rows(share, row_tokens)]
        parts.append(_score(engine, comm, rows, int(counts.sum()), step=-1))
        sample.append(np.repeat(batch.indices, counts))
        turn.append(np.arange(counts.sum()) - np.repeat(starts, counts))
    loss, tokens = _joined(parts)
    return TurnLosses(np.concatenate(sample), np.concatenate(turn), loss, tokens)


def _shares(
    comm: Comm, store: TokenStore, indices: Positions
) -> Iterator[tuple[CandidateBatch, Positions]]:
    for start in range(0, len(indices), CHUNK):
        batch = CandidateBatch(store, indices[start : start + CHUNK])
        yield batch, deal(batch.lengths, comm.groups)[comm.group]


def _score(engine: Engine, comm: Comm, rows: list[PackedRow], count: int, step: int) -> Scores:
    most = int(comm.exchange(step, "evaluation rows", [len(rows)]).max())
    rows = rows + [PackedRow.empty()] * (most - len(rows))
    return comm.gather(step, engine.score(rows, ScoreRequest()), count)


def _joined(parts: list[Scores]) -> tuple[Floats, Positions]:
    loss: Floats = torch.cat([part.loss.double().cpu() for part in parts]).numpy()
    tokens: Positions = torch.cat([part.tokens.cpu() for part in parts]).numpy()
    return loss, tokens


def _turns(mask: npt.NDArray[np.bool_]) -> Positions:
    """(len,) int64: for each token, the turn of the token that it predicts.

    Tokens that predict no trained one get a neighbour's turn; they have no loss.
    """
    begins = mask & ~np.append(False, mask[:-1])
    turn = np.maximum(np.cumsum(begins) - 1, 0)
    return np.append(turn[1:], turn[-1])


def _by_turn(row: PackedRow, turns: list[Positions], starts: Positions) -> PackedRow:
    """The row with its tokens' losses added up by turn; attention still goes by sample."""
    segment: list[Positions] = []
    where: list[int] = []
    for position in row.where:
        segment.append(turns[position] + len(where))
        where += range(int(starts[position]), int(starts[position] + turns[position][-1] + 1))
    return row._replace(sample=torch.from_numpy(np.concatenate(segment)), where=tuple(where))
