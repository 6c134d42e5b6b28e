"""The peak of a device in FLOP/s, which MFU divides by."""

from __future__ import annotations

import time

import torch

# Dense peaks without sparsity from the vendors' data sheets, in TFLOP/s: bfloat16 on tensor cores,
# float32 outside them (torch's default). None: the device has no such arithmetic. The first name
# that is part of torch's name for the device counts.
TFLOPS: dict[str, tuple[float | None, float]] = {
    "B200": (2250, 75),
    "GH200": (989, 67),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "L4": (121, 30.3),
    "A10G": (70, 35),
    "A10": (125, 31.2),
    "A40": (150, 37.4),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
    "V100": (None, 15.7),
}
_SIDE, _SECONDS = 1024, 0.4


def peak_of(name: str, dtype: str) -> tuple[float | None, str]:
    """FLOP/s of a GPU by torch's name for it, and where the number is from or why there is none."""
    for known, (bfloat16, float32) in TFLOPS.items():
        # "A10" is part of "A100" and "L4" of "L40S": a name ends where its letters and digits do.
        if _word(known, name):
            peak = bfloat16 if dtype == "bfloat16" else float32
            if peak is None:
                return None, f"{name} has no {dtype} arithmetic: pass --peak-flops"
            return peak * 1e12, f"data sheet of {known}, {dtype}"
    return None, f"no peak is known for {name}: pass --peak-flops"


def measured_peak(dtype: str) -> float:
    """FLOP/s of this rank's matrix products on the CPU, the best of a few tenths of a second.

    Call it on all ranks at once: they share the machine's cores, as they do in training.
    """
    a = torch.randn(_SIDE, _SIDE).to(getattr(torch, dtype))
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * _SIDE**3 / best


def _word(known: str, name: str) -> bool:
    at = name.find(known)
    if at < 0:
        return False
    before, after = name[:at][-1:], name[at + len(known) :][:1]
    return not before.isalnum() and not after.isalnum()
