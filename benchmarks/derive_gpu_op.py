"""What the farthest-point kernels should take on an H100, from what can be counted without one.

    python benchmarks/derive_gpu_op.py --n 16384 --d 512 [--json FILE]

The kernels' rounds and bounds are followed over N normal points, counting rounds and pairs; nvcc
compiles for sm_90 and cuobjdump shows the instructions of the inner loops; it calls nvdisasm, and
both must be on PATH (of the CUDA toolkit, or the packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm). The rates and latencies below are assumptions, each from a vendor's figure or
a published measurement; nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slap_ds.bench.environment import describe

ROOT = Path(__file__).resolve().parents[1]
BUILD = runpy.run_path(str(ROOT / "csrc" / "build.py"))
LOOPS = ("Shrink", "Filter", "Recheck", "PoolDistances")
COUNTS = ("rounds", "exact_rounds", "pairs", "exact_pairs", "filtered_pairs", "close_pairs")

SMS, CLOCK = 132, 1.755e9  # of an H100 SXM; cycles a second
ISSUE = 4  # warp instructions an SM starts a cycle
HMMA_CYCLES = 6.5  # of mma.m16n8k16 on one of four tensor cores: 62 % of what wgmma reaches
L2_BYTES = 5.5e12  # a second
L2_LATENCY = 700  # cycles, loaded
CHAIN_CYCLES = 4  # between dependent multiply-adds
PICK_CYCLES = 110  # two warp reductions, two shuffles, a row of shared memory
FIND_US = 7.0  # eight passes over registers and barriers of 1,024 threads
LAUNCH_US = 1.0  # between two kernels of a stream
READ_US = 20.0  # by the host, of how many picks are done
UNEVEN = 1.15  # blocks of 128 threads over 132 SMs: 2.6 a round on average, 3 on the busiest


POOL, CLOSE, REST = 128, 1 / 16, 2  # kBlock, kCloseShare / kBlock and kRest of csrc/cuda/
CENTRE_ROWS = 256


def count_rounds(points: Tensor, picks: int) -> dict[str, int]:
    """What the kernels do with (N, D) float32 points: the same rounds and bounds, with distances
    from matrix products, which are near enough to count by.

    tests/ops/test_farthest_point_cuda.py holds it to the counts of the emulated kernels.
    """
    n = len(points)
    rows = torch.arange(min(n, CENTRE_ROWS)) * n // min(n, CENTRE_ROWS)
    x = points - points[rows].mean(0)
    y = x.bfloat16().float()
    gamma = -(-x.shape[1] // 32) * 2 * 18 * 2.0**-22 + 2.0**-21
    bound = y.square().sum(1) / 2 * (1 - gamma)
    residual, norm = (x - y).norm(dim=1), x.square().sum(1)
    squared = torch.full((n,), torch.inf)
    counts = dict.fromkeys(COUNTS, 0)
    done, rest, close_before = 0, REST, 0.0
    while done < picks:
        fresh = (
            torch.zeros(1, dtype=torch.int64) if done == 0 else _choose(x, squared, picks - done)
        )
        squared[fresh] = -1.0
        targets = (squared > 0).nonzero()[:, 0]
        pairs = len(targets) * len(fresh)
        rest = REST if close_before > CLOSE else rest
        exact = rest > 0
        close_before, rest = 0.0, max(0, rest - 1)
        found = norm[targets, None] + norm[fresh] - 2 * x[targets] @ x[fresh].T
        if not exact:
            reach = residual[targets, None] + squared[targets, None].sqrt() + residual[fresh]
            half = bound[targets, None] + bound[fresh] - y[targets] @ y[fresh].T
            close = int((half <= reach.square() / 2).sum())
            counts["filtered_pairs"] += pairs
            counts["close_pairs"] += close
            close_before = close / max(1, pairs)
            exact = close_before > CLOSE
        counts["rounds"] += 1
        counts["pairs"] += pairs
        counts["exact_rounds"] += exact
        counts["exact_pairs"] += pairs * exact
        squared[targets] = squared[targets].minimum(found.amin(1).clamp(min=0))
        done += len(fresh)
    return counts | {"picks": picks}


def _choose(x: Tensor, squared: Tensor, left: int) -> Tensor:
    """A round's picks: greedy inside the pool, until the best outside is farther."""
    top = squared.topk(min(POOL + 1, int((squared >= 0).sum())))
    pool = top.indices[:POOL].sort().values
    beyond = float(top.values[POOL]) if len(top.values) > POOL else -1.0
    between = torch.cdist(x[pool], x[pool]).square().numpy()
    current = squared[pool].numpy().copy()
    chosen: list[int] = []
    while len(chosen) < min(left, len(pool)):
        best = int(current.argmax())
        if chosen and current[best] < beyond:
            break
        chosen.append(best)
        current = np.minimum(current, between[best])
        current[chosen] = -2.0
    return pool[chosen]


def count_instructions() -> dict[str, dict[str, int]]:
    """Of the loop with the most arithmetic in each kernel, on sm_90: instructions by name."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "op.cubin"
        flags = ["-std=c++17", "-O3", "--fmad=false", "-arch=sm_90", "-cubin"]
        source = ROOT / "csrc" / "cuda" / "farthest_point.cu"
        BUILD["run"]([BUILD["find_nvcc"](), *flags, str(source), "-o", str(cubin)])
        listing = subprocess.run(
            ["cuobjdump", "-sass", cubin], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    found = {}
    for part in listing.split("Function : ")[1:]:
        (kernel,) = re.findall(r"_cu_\w{8}\d+([A-Z][A-Za-z]+?)E(?:NS|PKv)", part.split("\n", 1)[0])
        if kernel not in LOOPS:
            continue
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?\s*([A-Z0-9.]+)([^;]*);", part)
        code = [(int(at, 16), name.partition(".")[0], rest) for at, name, rest in lines]
        found[kernel] = _busiest_loop(code)
    return found


def _busiest_loop(code: list[tuple[int, str, str]]) -> dict[str, int]:
    """Between a jump back and its target: the loop that is densest in products."""
    best: dict[str, int] = {}
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target is None or int(target[1], 16) >= at:
            continue
        loop: dict[str, int] = {}
        for other, op, _ in code:
            if int(target[1], 16) <= other <= at:
                loop[op] = loop.get(op, 0) + 1

        def weight(x: dict[str, int]) -> float:
            products = x.get("FFMA", 0) + 1000 * x.get("HMMA", 0)
            return products / (sum(x.values()) ** 0.5 or 1)

        if not best or weight(loop) > weight(best):
            best = loop
    return best


def derive(n: int, d: int, counts: dict[str, int], loops: dict[str, dict[str, int]]) -> Any:
    """Milliseconds by kernel."""
    rounds, exact = counts["rounds"], counts["exact_rounds"]
    filtered = rounds - exact
    shrink = loops["Shrink"]
    per_product = sum(shrink.values()) / shrink["FFMA"]  # instructions a pair and dimension
    shrink_s = counts["exact_pairs"] * d * per_product / 32 / (SMS * ISSUE * CLOCK) * UNEVEN
    # Filter: tiles of 64 x 128 whole; what is longer, the tensor cores or the rows from L2.
    tiles = counts["filtered_pairs"] / (counts["picks"] / rounds) / 64
    products_s = tiles * 64 * 128 * d / 2048 * HMMA_CYCLES / (SMS * 4 * CLOCK)
    rows_s = tiles * (64 + 128) * d * 2 / L2_BYTES
    filter_s = max(products_s, rows_s) + filtered * 2 * L2_LATENCY / CLOCK
    chunks = -(-d // 64)
    recheck_s = counts["close_pairs"] * 2 * d * 4 / L2_BYTES
    recheck_s += filtered * (d * CHAIN_CYCLES + chunks * L2_LATENCY) / CLOCK
    pool_s = rounds * (d * (CHAIN_CYCLES + 1) + chunks * L2_LATENCY) / CLOCK
    greedy_s = (counts["picks"] * PICK_CYCLES + rounds * 4 * L2_LATENCY) / CLOCK
    return {
        "FindPool": rounds * FIND_US / 1e3,
        "PoolDistances": pool_s * 1e3,
        "Greedy": greedy_s * 1e3,
        "FindTargets": rounds * 3 * L2_LATENCY / CLOCK * 1e3,
        "Filter": filter_s * 1e3,
        "Recheck": recheck_s * 1e3,
        "Shrink": shrink_s * 1e3,
        "launches": rounds * 7 * LAUNCH_US / 1e3,
        "reads by the host": 7 * READ_US / 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=16384)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--json", type=Path, help="write counts and derivation here")
    options = parser.parse_args()
    lacking = [tool for tool in ("cuobjdump", "nvdisasm") if shutil.which(tool) is None]
    lacking += [] if BUILD["find_nvcc"]() else ["nvcc"]
    if lacking:
        parser.error(f"{', '.join(lacking)} not found on PATH: of the CUDA toolkit, or by pip")
    loops = count_instructions()
    points = torch.randn(options.n, options.d, generator=torch.Generator().manual_seed(0))
    counts = count_rounds(points, int(options.keep * options.n))
    without = dict(counts, exact_rounds=counts["rounds"], exact_pairs=counts["pairs"])
    without |= {"filtered_pairs": 0, "close_pairs": 0}
    derived = {
        "with": derive(options.n, options.d, counts, loops),
        "without": derive(options.n, options.d, without, loops),
    }
    print(json.dumps({"counts": counts, "loops": loops}, indent=1))
    print("| ms | with the filter | without |\n| --- | --- | --- |")
    for kernel, ms in derived["with"].items():
        print(f"| {kernel} | {ms:.2f} | {derived['without'][kernel]:.2f} |")
    print("| together | " + " | ".join(f"{sum(x.values()):.1f}" for x in derived.values()) + " |")
    if options.json:
        shape = {"n": options.n, "d": options.d, "keep": options.keep}
        result = {**shape, "counts": counts, "loops": loops, "derived_ms": derived, **describe()}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
