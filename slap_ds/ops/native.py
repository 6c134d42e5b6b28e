"""The native library of `csrc/`, through ctypes: loaded once, PyTorch-free on its side.

`csrc/slap_fps.h` is the interface; the two structures below mirror it field by field, and
`slap_fps_abi` guards against a library that was built from another version of it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from slap_ds.ops.plan import Plan

ABI = 1
CPU_LIBRARY = Path(__file__).with_name("_slap_fps.so")
CUDA_LIBRARY = Path(__file__).with_name("_slap_fps_cuda.so")
# Names of SlapFpsPath, in its order.
PATHS = ("auto", "portable", "avx2", "avx512", "avx512 vnni")
STATUS = {
    1: "an argument is out of range",
    2: "this machine or this build has not got the path asked for",
    3: "out of memory",
}


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "d", "k", "g", "m", "first")),
        *((name, ctypes.c_int32) for name in ("across_strata", "bfloat16")),
        *(
            (name, ctypes.c_void_p)
            for name in ("features", "budgets", "strata", "groups", "quotas")
        ),
    )


class _Options(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in ("path", "threads", "block"))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def problem(features: Tensor, plan: Plan) -> _Problem:
    """Features and plan must outlive what this returns: it holds their addresses only."""
    n, d = features.shape
    return _Problem(
        n,
        d,
        plan.budgets.numel(),
        0 if plan.quotas is None else plan.quotas.numel(),
        plan.picks,
        plan.first,
        plan.across_strata,
        features.dtype == torch.bfloat16,
        *map(_pointer, (features, plan.budgets, plan.strata, plan.groups, plan.quotas)),
    )


def load(library: Path) -> ctypes.CDLL:
    """Raises OSError where the file is missing, cannot be loaded, or is of another version."""
    if not library.exists():
        raise OSError(f"{library.name} was not built: its compiler was not found at install time")
    loaded = ctypes.CDLL(str(library))
    loaded.slap_fps_abi.restype = ctypes.c_int32
    if (found := loaded.slap_fps_abi()) != ABI:
        raise OSError(f"{library.name} has ABI {found}, expected {ABI}: install slap_ds again")
    return loaded


@cache
def cpu_library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        return load(CPU_LIBRARY)
    except OSError as error:
        return str(error)


@cache
def cuda_library() -> ctypes.CDLL | str:
    """The CUDA library, or why there is none."""
    try:
        return load(CUDA_LIBRARY)
    except OSError as error:
        return str(error)


@cache
def usable_cuda_library(device: torch.device) -> ctypes.CDLL | str:
    """The CUDA library, or why it is not there or cannot run on this GPU: one tiny selection is
    tried (a driver may be older than the library, or a GPU than what it was compiled for)."""
    library = cuda_library()
    if isinstance(library, str):
        return library
    plan = Plan(1, torch.ones(1, dtype=torch.int64), 0, True, None, None, None)
    try:
        farthest_point_cuda(library, torch.zeros(1, 1, device=device), plan)
    except RuntimeError as error:
        return f"{CUDA_LIBRARY.name} does not run on this GPU ({error})"
    return library


def cpu_paths(library: ctypes.CDLL) -> list[str]:
    """The paths this build and this processor have, slowest first; any gives the same bits."""
    return [path for i, path in enumerate(PATHS) if i > 0 and library.slap_fps_has_path(i)]


def auto_path(library: ctypes.CDLL) -> str:
    """The instruction set that the library takes on this processor."""
    return PATHS[library.slap_fps_auto_path()]


def farthest_point_cpu(
    library: ctypes.CDLL,
    features: Tensor,
    plan: Plan,
    *,
    path: str = "auto",
    threads: int | None = None,
    block: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, D) on the CPU to picks (M,) int64, squared pick distance (M,), squared distance (N,).

    threads: PyTorch's number by default. block: points a pool round works on, 0 for the default.
    """
    picks = torch.empty(plan.picks, dtype=torch.int64)
    pick_squared = torch.empty(plan.picks, dtype=torch.float32)
    squared = torch.empty(features.shape[0], dtype=torch.float32)
    status = library.slap_fps_cpu(
        ctypes.byref(problem(features, plan)),
        ctypes.byref(_Options(PATHS.index(path), threads or torch.get_num_threads(), block)),
        *(ctypes.c_void_p(out.data_ptr()) for out in (picks, pick_squared, squared)),
    )
    if status == 3:
        raise MemoryError("slap_fps_cpu: out of memory")
    if status != 0:
        raise RuntimeError(f"slap_fps_cpu: {STATUS.get(status, f'status {status}')}")
    return picks, pick_squared, squared


def farthest_point_cuda(
    library: ctypes.CDLL, features: Tensor, plan: Plan, *, stream: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`farthest_point_cpu` for features on a GPU; the results are on it too, queued on `stream`.

    The caller has made the features' device the current one: the library must work in its context.
    """
    device = features.device
    picks = torch.empty(plan.picks, dtype=torch.int64, device=device)
    pick_squared = torch.empty(plan.picks, dtype=torch.float32, device=device)
    squared = torch.empty(features.shape[0], dtype=torch.float32, device=device)
    asked = problem(features, plan)
    library.slap_fps_cuda_workspace.restype = ctypes.c_int64
    library.slap_fps_cuda_error.restype = ctypes.c_char_p
    size = library.slap_fps_cuda_workspace(ctypes.byref(asked))
    # From PyTorch's allocator, which reuses it only after what is queued on the stream.
    workspace = torch.empty(size // 4 + 64, dtype=torch.float32, device=device)
    status = library.slap_fps_cuda(
        ctypes.byref(asked),
        ctypes.c_int32(device.index or 0),
        ctypes.c_void_p(stream),
        ctypes.c_void_p((workspace.data_ptr() + 255) // 256 * 256),
        *(ctypes.c_void_p(out.data_ptr()) for out in (picks, pick_squared, squared)),
    )
    if status != 0:
        why = STATUS.get(status) or library.slap_fps_cuda_error().decode()
        raise RuntimeError(f"slap_fps_cuda: {why}")
    return picks, pick_squared, squared
