"""What a call of the farthest-point op asks for, checked once for all paths.

Every path (PyTorch, C++, CUDA) starts from a `Plan`; none of them checks anything a user could get
wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A chain of D fused multiply-adds may exceed the true sum by a factor of (1 + 2^-24)^D: 1.004 at D
# = 65,536.
OVERFLOW_LIMIT = 0.99 * torch.finfo(torch.float32).max
MAX_DIMENSIONS = 65536


@dataclass(frozen=True)
class Plan:
    """A checked request. Tensors are contiguous, int64, on the CPU."""

    picks: int  # M >= 1, the sum of the budgets
    budgets: Tensor  # (K,)
    first: int
    across_strata: bool
    strata: Tensor | None  # (N,) in [0, K)
    groups: Tensor | None  # (N,) in [0, G)
    quotas: Tensor | None  # (G,)


def check(
    features: Tensor,
    budgets: Tensor,
    strata: Tensor | None,
    first: int,
    across_strata: bool,
    groups: Tensor | None,
    quotas: Tensor | None,
) -> Plan:
    """Turn arguments into a `Plan`, or raise a ValueError: what is wrong, what was expected."""
    n = _check_features(features)
    budgets = _ids(budgets, "budgets", None)
    wanted = budgets.tolist()  # K is small: Python's integers are quicker than tensors of it
    k, m = len(wanted), sum(wanted)
    if k == 0:
        raise ValueError("budgets: found none, expected (K,) with K >= 1; pass one a stratum.")
    if min(wanted) < 0:
        raise ValueError(f"budgets: found {min(wanted)}, expected values >= 0.")
    if m == 0:
        raise ValueError("budgets: they sum to 0, expected at least 1 pick; skip the call instead.")

    if strata is None and k != 1:
        raise ValueError(f"strata: found None with {k} budgets; pass each point's stratum.")
    if strata is not None:
        strata = _ids(strata, "strata", n)
        _check_range(strata, "strata", k, "budgets")
    sizes = [n] if strata is None else torch.bincount(strata, minlength=k).tolist()
    for stratum, (budget, size) in enumerate(zip(wanted, sizes, strict=True)):
        if budget > size:
            raise ValueError(
                f"budgets[{stratum}]: found {budget}, expected at most {size}, the size of stratum "
                f"{stratum}; lower it."
            )

    if not 0 <= first < n:
        raise ValueError(f"first: found {first}, expected an index in [0, {n}).")
    opening = next(stratum for stratum, budget in enumerate(wanted) if budget > 0)
    if strata is not None and int(strata[first]) != opening:
        raise ValueError(
            f"first: point {first} lies in stratum {int(strata[first])}, expected stratum "
            f"{opening}, the first one that has a budget; pass one of its points."
        )

    if (groups is None) != (quotas is None):
        raise ValueError("groups, quotas: found only one of the two; pass both or neither.")
    if groups is not None and quotas is not None:
        groups, quotas = _ids(groups, "groups", n), _ids(quotas, "quotas", None)
        _check_quotas(groups, quotas, m, first)
    return Plan(m, budgets, first, across_strata, strata, groups, quotas)


def _check_features(features: Tensor) -> int:
    if features.dim() != 2:
        raise ValueError(
            f"features: found shape {tuple(features.shape)}, expected (N, D): a row a point."
        )
    if features.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"features: found {features.dtype}, expected torch.float32 or torch.bfloat16; convert."
        )
    n, d = features.shape
    if n == 0 or d == 0:
        raise ValueError(f"features: found the empty shape ({n}, {d}), expected N >= 1 and D >= 1.")
    if d > MAX_DIMENSIONS or n >= 2**31:
        raise ValueError(
            f"features: found ({n}, {d}), expected N < 2**31 and D <= {MAX_DIMENSIONS}."
        )
    if not features.is_contiguous():
        raise ValueError("features: found a non-contiguous tensor; call .contiguous() on it first.")
    # Two passes and one copy to the host tell everything: a NaN or an infinity in a column shows in
    # its largest or smallest value, and no two points are farther apart than the corners of their
    # box.
    high, low = features.amax(0).double(), features.amin(0).double()
    diagonal = float((high - low).square().sum())
    if diagonal <= OVERFLOW_LIMIT:
        return n
    finite = features.isfinite()
    if not bool(finite.all()):
        row, column = (int(i) for i in (~finite).nonzero()[0])
        raise ValueError(
            f"features: found {float(features[row, column])} at [{row}, {column}], expected finite "
            "values; look for the overflow that made it."
        )
    raise ValueError(
        f"features: the box around the points has a squared diagonal of {diagonal:.3g}, expected "
        f"at most {OVERFLOW_LIMIT:.3g}: a squared distance could overflow float32; scale them down."
    )


def _ids(values: Tensor, name: str, length: int | None) -> Tensor:
    if values.dtype != torch.int64:
        raise ValueError(f"{name}: found {values.dtype}, expected torch.int64; convert it.")
    if values.dim() != 1 or length not in (None, values.shape[0]):
        expected = "(one value a point)" if length is None else f"({length},)"
        raise ValueError(f"{name}: found shape {tuple(values.shape)}, expected {expected}.")
    return values.cpu().contiguous()


def _check_range(ids: Tensor, name: str, count: int, counted: str) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= count:
        raise ValueError(
            f"{name}: found the id {low if low < 0 else high}, expected ids in [0, {count}), "
            f"as there are {count} {counted}."
        )


def _check_quotas(groups: Tensor, quotas: Tensor, m: int, first: int) -> None:
    if quotas.numel() == 0 or int(quotas.min()) < 0:
        raise ValueError(f"quotas: found {quotas.tolist()}, expected (G,) values >= 0 with G >= 1.")
    _check_range(groups, "groups", quotas.numel(), "quotas")
    limit = int(torch.minimum(quotas, torch.bincount(groups, minlength=quotas.numel())).sum())
    if m > limit:
        raise ValueError(
            f"quotas: the groups give at most {limit} picks, expected at least {m}, the sum of "
            "the budgets; raise the quotas or lower the budgets."
        )
    if int(quotas[groups[first]]) == 0:
        raise ValueError(
            f"first: point {first} lies in group {int(groups[first])}, whose quota is 0; pass a "
            "point of a group that has one."
        )
