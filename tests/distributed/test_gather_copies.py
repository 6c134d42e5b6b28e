"""The gather of scores: what it copies, counted in bytes that are allocated on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slap_ds.distributed.comm import Comm, RankDisagreement
from slap_ds.scoring import Scores

N, D = 500, 300


class Allocated(TorchDispatchMode):
    """Counts the bytes of new tensors at least half as large as the sketches."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in old:
            size = out.untyped_storage().nbytes()
            self.bytes += size if size >= N * D * 2 else 0
        return out


def scores(positions: torch.Tensor) -> Scores:
    n = len(positions)
    generator = torch.Generator().manual_seed(0)
    return Scores(
        positions=positions,
        loss=torch.rand(n, generator=generator),
        tokens=torch.arange(n) + 1,
        gradient=torch.randn(n, D, generator=generator),
        diagonal=torch.rand(7, generator=generator),
        diagonal_tokens=n,
    )


def test_on_one_rank_the_sketches_are_put_in_order_and_copied_no_more() -> None:
    local = scores(torch.randperm(N, generator=torch.Generator().manual_seed(1)))
    with Allocated() as allocated:
        whole = Comm().gather(0, local, N)
    assert allocated.bytes <= N * D * 4
    order = local.positions.argsort()
    assert torch.equal(whole.gradient, local.gradient[order])
    assert torch.equal(whole.loss, local.loss[order])
    assert torch.equal(whole.tokens, local.tokens[order])
    assert torch.equal(whole.diagonal, local.diagonal.double())


def test_candidates_that_are_missing_or_there_twice_are_an_error() -> None:
    with pytest.raises(RankDisagreement, match=r"500 candidates \(\[500\] by rank\), not"):
        Comm().gather(3, scores(torch.arange(N) // 2), N)
