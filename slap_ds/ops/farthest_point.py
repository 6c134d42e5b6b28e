"""Farthest-point selection inside strata: the custom op `slap_ds::farthest_point`.

arguments -> plan.check (the only place that refuses anything) -> CUDA, C++ or PyTorch -> the root
of the final distances. All paths give the same bits; `reference.py` says which.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slap_ds.ops import fallback, native
from slap_ds.ops.plan import Plan, check


class FarthestPoints(NamedTuple):
    """What `farthest_point` returns, on the device of the features."""

    picks: (
        Tensor  # (M,) int64: indices into the features, in the order they were picked, never twice
    )
    pick_distance: (
        Tensor  # (M,) float32: the SQUARED distance at which each was picked; inf: no pick before
    )
    distance: (
        Tensor  # (N,) float32: each point's distance (a root) to its nearest pick; 0 for the picks
    )


def farthest_point(
    features: Tensor,
    budgets: Tensor,
    strata: Tensor | None = None,
    *,
    first: int,
    across_strata: bool = True,
    groups: Tensor | None = None,
    quotas: Tensor | None = None,
) -> FarthestPoints:
    """Pick, stratum after stratum, the point whose smallest L2 distance to the picks so far is
    largest.

    features: (N, D) float32 or bfloat16, contiguous, on any device. budgets: (K,) int64, picks a
    stratum. strata: (N,) int64 in [0, K), or None for one stratum. first: the first pick, a point
    of the first stratum that has a budget. across_strata: measure to the picks of all strata (True)
    or of the point's own stratum only (False; a stratum without picks then starts with its lowest
    index). groups (N,) int64 in [0, G) and quotas (G,) int64: a group that has given its quota
    offers no more points; what a stratum then cannot fill is handed to the next one, cyclically.
    Ties go to the lowest index. The four id tensors may live on the CPU (the cheapest: the host
    reads them) or with the features.

    Raises ValueError, before any pick, for: a wrong shape, dtype or id; an empty or non-contiguous
    tensor; NaN or infinite features; a bounding box whose squared diagonal overflows float32; a
    budget over its stratum's size; budgets that sum to 0 or to more than the quotas allow; a wrong
    `first`.

    The method is the k-center greedy of Gonzalez (1985), as SLAP (arXiv 2605.23969) uses it.

    >>> points = torch.tensor([[0.0], [1.0], [5.0], [6.0]])
    >>> farthest_point(points, torch.tensor([3]), first=0).picks
    tensor([0, 3, 1])
    """
    return FarthestPoints(
        *torch.ops.slap_ds.farthest_point(
            features.detach(), budgets, strata, first, across_strata, groups, quotas
        )
    )


@torch.library.custom_op("slap_ds::farthest_point", mutates_args=())
def _op(
    features: Tensor,
    budgets: Tensor,
    strata: Tensor | None,
    first: int,
    across_strata: bool,
    groups: Tensor | None,
    quotas: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = check(features, budgets, strata, first, across_strata, groups, quotas)
    picks, pick_squared, squared = run_plan(features, plan)
    device = features.device
    return picks.to(device), pick_squared.to(device), squared.sqrt().to(device)


def run_plan(features: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """A checked request on the fastest path there is: picks (M,), their squared distances (M,) and
    each point's (N,), on the features' device or the CPU."""
    if features.is_cuda:
        # The library launches on the current device: without the guard, rank 1's kernels would be
        # queued on GPU 0.
        with torch.cuda.device(features.device):
            cuda = native.usable_cuda_library(features.device)
            if not isinstance(cuda, str):
                stream = torch.cuda.current_stream(features.device).cuda_stream
                return native.farthest_point_cuda(cuda, features, plan, stream=stream)
    library = native.cpu_library()
    if isinstance(library, str):
        return fallback.farthest_point(features.cpu(), plan)
    return native.farthest_point_cpu(library, features.cpu(), plan)


@_op.register_fake
def _(
    features: Tensor,
    budgets: Tensor,
    strata: Tensor | None,
    first: int,
    across_strata: bool,
    groups: Tensor | None,
    quotas: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    m = torch.library.get_ctx().new_dynamic_size(min=1)
    return (
        features.new_empty(m, dtype=torch.int64),
        features.new_empty(m, dtype=torch.float32),
        features.new_empty(features.shape[0], dtype=torch.float32),
    )


def active_path() -> tuple[str, str]:
    """The path in use, and why; `slap-ds doctor` prints it.

    The GPU's where there is a GPU, for features on it; else the one that features on the CPU take.
    """
    cuda = native.cuda_library()
    if torch.cuda.is_available() and not isinstance(cuda, str):
        cuda = native.usable_cuda_library(torch.device("cuda", torch.cuda.current_device()))
    if torch.cuda.is_available() and not isinstance(cuda, str):
        return "cuda", f"{torch.cuda.get_device_name()} and {native.CUDA_LIBRARY.name} are there"
    no_gpu = f"no GPU path: {cuda}" if isinstance(cuda, str) else "no GPU path: PyTorch sees no GPU"
    library = native.cpu_library()
    if isinstance(library, str):
        return "pytorch fallback", f"{library}; {no_gpu}"
    others = [path for path in native.cpu_paths(library) if path != native.auto_path(library)]
    why = f"the fastest of this build on this processor, which also has {', '.join(others)}"
    return f"cpu: {native.auto_path(library)}", f"{why}; {no_gpu}"
