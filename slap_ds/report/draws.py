"""What a run drew and what it trained, step by step.

The candidate stream is deterministic, so the candidates are drawn again from the run's config, and
the picks are read from picks.jsonl: nothing about candidates has to be logged.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from slap_ds.config.schema import Config
from slap_ds.data.store import POSITION_BITS, TokenStore
from slap_ds.jsonl import read_lines
from slap_ds.train.inputs import make_parts

Int64 = npt.NDArray[np.int64]


class Draw(NamedTuple):
    """One step's candidates and picks, as positions in the store."""

    step: int
    candidates: Int64  # (N,)
    picks: Int64  # (M,)
    weights: list[float]  # (M,)
    losses: list[float | None] | None  # (M,) nats per token as they were scored, if they were


def draws(run_dir: Path, config: Config, store: TokenStore) -> Iterator[Draw]:
    """The finished steps of a run, in order.

    Raises:
        FileNotFoundError: no run there.
        ValueError: the data have changed since the run.
    """
    records = read_lines(run_dir / "picks.jsonl")
    stream, _, _ = make_parts(config, store)
    for batch, record in zip(islice(stream, len(records)), records, strict=True):
        ids = np.asarray(record["ids"], dtype=np.int64)
        places = ids & ((1 << POSITION_BITS) - 1)
        if not np.isin(places, batch).all() or (store.sample_ids[places] != ids).any():
            raise ValueError(
                f"{str(run_dir)!r} picked samples at step {record['step']} that its data do not "
                "hold there: the files in data.train have changed since"
            )
        yield Draw(record["step"], batch, places, record["weights"], record.get("losses"))
