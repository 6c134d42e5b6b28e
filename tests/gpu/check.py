"""All checks of the farthest-point kernels that need a CUDA machine, in one go.

    python tests/gpu/check.py [--json benchmarks/results/farthest_point_cuda.json]

Builds csrc/ (an error without nvcc), runs tests/gpu, compute-sanitizer where it is installed, and
times the op against its roofline: two instructions a pair and dimension, measured as half the rate
of a float32 matrix product of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(512, 64), (2048, 512), (4096, 512), (16384, 512), (16384, 4096)]
KEEP = 0.7
PAIRS = KEEP - KEEP**2 / 2  # of N^2: a pick need not be compared with earlier ones
SANITIZED = """
import torch
from slap_ds.ops import farthest_point
points = torch.randn(700, 70, device="cuda")
strata = torch.arange(700) % 3
farthest_point(points, torch.tensor([200, 100, 150]), strata, first=0)
torch.cuda.synchronize()
"""


def run(command: list[str]) -> None:
    print("$", " ".join(command), flush=True)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environ, check=True)


def milliseconds(call: Any, repeats: int) -> float:
    import torch

    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def timings() -> dict[str, Any]:
    import torch

    sys.path.insert(0, str(ROOT))
    from slap_ds.ops import farthest_point

    torch.backends.cuda.matmul.allow_tf32 = False
    square = torch.randn(8192, 8192, device="cuda")
    rate = 8192**3 / (milliseconds(lambda: square @ square, 5) / 1e3)
    cases = []
    for n, d in SIZES:
        points = torch.randn(n, d, device="cuda")
        budgets = torch.tensor([int(KEEP * n)])
        for across, strata in ((True, None), (True, torch.arange(n) % 8)):
            share = budgets if strata is None else torch.full((8,), int(KEEP * n) // 8)
            ms = milliseconds(
                lambda p=points, b=share, s=strata, x=across: farthest_point(
                    p, b, s, first=0, across_strata=x
                ),
                5,
            )
            roofline = 1e3 * PAIRS * n * n * d / (rate / 2)
            case = {"n": n, "d": d, "strata": len(share), "ms": ms, "roofline_ms": roofline}
            cases.append(case | {"ratio": ms / roofline})
            print(json.dumps(cases[-1]), flush=True)
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit,
        "sgemm_tmadds": rate / 1e12,
        "cases": cases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the timings here")
    options = parser.parse_args()
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        sys.exit("gpu-check: nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
    run([sys.executable, "csrc/build.py"])
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check: the CUDA library is built; PyTorch sees no GPU to run it on")
    run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"])
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck", "synccheck"):
            run([sanitizer, "--tool", tool, "--error-exitcode=1", sys.executable, "-c", SANITIZED])
    else:
        print("compute-sanitizer is not installed: left out")
    result = timings()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
