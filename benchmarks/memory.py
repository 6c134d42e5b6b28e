"""Peak memory of a piece of work, above what was there before: on CUDA and on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorPeak(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once, each storage once.

    It sees tensors, not the scratch of the kernels that make them.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.live: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.known and key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.bytes = max(self.bytes, sum(self.live.values()))
        return out


def peak_bytes(work: Callable[[], Any], device: torch.device, known: Iterable[Tensor] = ()) -> int:
    """Bytes that `work` needs at once beside the tensors in `known`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with TensorPeak(known) as peak:
        work()
    return peak.bytes
