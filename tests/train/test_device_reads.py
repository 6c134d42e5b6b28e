"""How often the host reads a value back from the device in a step's scoring and training.

On a GPU each such read waits for all that is queued. They are counted on a CPU, by the operators
and methods that do it; the optimizer's own, which reads step numbers on the host, is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slap_ds.config.schema import Config
from slap_ds.data.packing import Candidate, PackedRow, make_row
from slap_ds.train.run import Run, prepare
from tests.recipes import tiny_config, tiny_model

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero, aten.masked_select}


class Reads(TorchDispatchMode):
    """Counts reads while it is open: operators here, methods that need none by `patch`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        boolean = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if func.overloadpacket in READS or boolean:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("tolist", "numpy", "cpu"):
            method = getattr(torch.Tensor, name)

            def counted(tensor: torch.Tensor, method: Any = method, name: str = name) -> Any:
                if tensor.is_floating_point():  # positions and counts are the host's own
                    self.seen.append(name)
                return method(tensor)

            monkeypatch.setattr(torch.Tensor, name, counted)


def rows(count: int, samples: int, tokens: int) -> list[PackedRow]:
    """`count` rows of `samples` answers of `tokens` tokens."""
    rng = np.random.default_rng(0)
    out = []
    for r in range(count):
        whole = [rng.integers(3, 2000, tokens + 1) for _ in range(samples)]
        mask = np.ones(tokens + 1, dtype=bool)
        out.append(make_row([Candidate(r * samples + i, x, mask) for i, x in enumerate(whole)]))
    return out


def test_reads_of_a_step_do_not_grow_with_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 rows of 8,192 response tokens, 65,536 in all: at most 12 reads; as many as of 2 rows."""
    run = prepare(config(tmp_path))
    monkeypatch.setattr(run.engine.optimizer, "step", lambda: None)
    few, many = (reads_of(run, rows(count, 16, 512), monkeypatch) for count in (2, 8))
    assert 0 < len(many) <= 12, many
    assert many == few


def reads_of(run: Run, scored: list[PackedRow], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reads of scoring these rows and training half of them."""
    engine, samples = run.engine, sum(len(row.where) for row in scored)
    assert sum(len(row.response) for row in scored) == samples * 512
    reads = Reads()
    with monkeypatch.context() as patched, reads:
        reads.patch(patched)
        scores = engine.score(scored, run.scorer.request(1), keep=True)
        gathered = run.comm.gather(0, scores, samples)
        run.scorer.finish(gathered, torch.arange(samples))
        engine.train(scored[: len(scored) // 2], 1000.0, 1e-4, replay=True)
    return reads.seen


def config(folder: Path) -> Config:
    return tiny_config(
        tiny_model(folder / "model", max_position_embeddings=1024),
        folder / "run",
        engine={"kind": "torch"},
        model={"gradient_checkpointing": True, "attention": "packed"},
        step={"forward": "reuse"},
    )
