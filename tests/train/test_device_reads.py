"""How often the host reads a value back from the device in a whole training step.

On a GPU each such read waits for all that is queued. They are counted on a CPU: what is computed
from the model's weights is taken to lie on the device, until it is copied to the host, and the
operators and methods are counted that would wait for it there. The kernels of the farthest-point op
are left out (they read how many picks are done, once for a batch of rounds), and so is the
optimizer's own, which reads step numbers on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from slap_ds.config.schema import Config
from slap_ds.data.batch import CandidateBatch
from slap_ds.data.store import Sample
from slap_ds.ops.farthest_point import FarthestPoints, run_plan
from slap_ds.ops.plan import check
from slap_ds.selection import slap
from slap_ds.train.record import train_step
from slap_ds.train.run import Run, prepare
from tests.recipes import tiny_config, tiny_model

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero, aten.masked_select}


class Reads(TorchDispatchMode):
    """Counts reads while it is open: operators here, methods that need none by `patch`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        # Weak references keep an address from being given to another storage.
        self._device: dict[int, StorageWeakRef] = {}

    def put(self, tree: Any) -> None:
        """From now on these tensors lie on the device."""
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor):
                self._device[tensor.untyped_storage()._cdata] = StorageWeakRef(
                    tensor.untyped_storage()
                )

    def holds(self, tree: Any) -> bool:
        """Whether any of these tensors lies on the device."""
        tensors = [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
        return any(x.untyped_storage()._cdata in self._device for x in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.holds((args, kwargs)):
            boolean = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
                i is not None and i.dtype == torch.bool for i in args[1]
            )
            if func.overloadpacket in READS or boolean:
                self.seen.append(str(func))
            self.put(out)
        return out

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("tolist", "numpy", "cpu"):
            method = getattr(torch.Tensor, name)

            def counted(tensor: Tensor, method: Any = method, name: str = name) -> Any:
                if not self.holds(tensor):
                    return method(tensor)
                self.seen.append(name)
                with _disable_current_modes():
                    return method(tensor.clone())

            monkeypatch.setattr(torch.Tensor, name, counted)

        def op(features: Tensor, budgets: Tensor, strata: Tensor, **options: Any) -> FarthestPoints:
            """The op without torch's registry, which would hide what it reads."""
            options = {"groups": None, "quotas": None, **options}
            plan = check(features, budgets, strata, **options)
            with _disable_current_modes():
                points = FarthestPoints(*run_plan(features.clone(), plan))
            self.put(points)
            return points

        monkeypatch.setattr(slap, "farthest_point", op)


@dataclass(frozen=True)
class Answers:
    """A store of `count` samples, each of a token to start from and `tokens` trained ones."""

    count: int
    tokens: int

    def __post_init__(self) -> None:
        ones = np.ones(self.count, dtype=np.int64)
        object.__setattr__(self, "lengths", ones * (self.tokens + 1))
        object.__setattr__(self, "trained_tokens", ones * self.tokens)
        object.__setattr__(self, "sample_ids", np.arange(self.count))
        object.__setattr__(self, "content", np.arange(self.count))

    def __getitem__(self, index: int) -> Sample:
        ids = np.random.default_rng(index).integers(3, 2000, self.tokens + 1)
        mask = np.arange(self.tokens + 1) > 0
        return Sample(ids=ids, mask=mask)


@pytest.mark.parametrize("forward", ["reuse", "separate"])
def test_reads_of_a_step_do_not_grow_with_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: str
) -> None:
    """128 answers of 512 tokens, 65,536 in all: at most 12 reads; as many as with a quarter."""
    run = prepare(config(tmp_path, forward))
    monkeypatch.setattr(run.engine.optimizer, "step", lambda: None)
    few, many = (reads_of(run, Answers(count, 512), monkeypatch) for count in (32, 128))
    assert 4 < len(many) <= 12, many
    assert many == few


def reads_of(run: Run, answers: Answers, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reads of a step on all of them, from drawing candidates to what is written of it."""
    reads = Reads()
    reads.put(list(run.engine.model.parameters()))
    batch = CandidateBatch(answers, np.arange(answers.count))  # type: ignore[arg-type]
    with monkeypatch.context() as patched, reads:
        reads.patch(patched)
        record = train_step(run, 1, batch)
    assert record.metrics["picked"] < record.metrics["candidates"]
    assert record.metrics["forward"] == run.config.step.forward
    assert record.metrics["nonfinite"] == 0
    return reads.seen


def config(folder: Path, forward: str) -> Config:
    return tiny_config(
        tiny_model(folder / "model", max_position_embeddings=1024),
        folder / "run",
        engine={"kind": "torch"},
        model={"gradient_checkpointing": True, "attention": "packed"},
        batch={"micro_batch_tokens": 8300},
        selection={"method": "slap", "keep": 0.6},
        step={"forward": forward},
    )
