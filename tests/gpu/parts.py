"""The parts of tests/gpu/check.py: one a process.

    python -m tests.gpu.parts PART --out DIR [--device cpu] [--tiny]

Each is a function of the device and of `tiny` that returns facts for DIR/PART.json, raises where
something is wrong (AssertionError or what went wrong), or raises Skip.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slap_ds.bench.environment import describe
from slap_ds.ops import farthest_point, native
from tests.gpu.check import Skip

ROOT = Path(__file__).resolve().parents[2]
KEEP = 0.7
PAIRS = KEEP - KEEP**2 / 2  # of N^2: a pick need not be compared with earlier ones


def smoke(device: torch.device, tiny: bool, out: Path) -> dict[str, Any]:
    """Imports, the op on the device, one collective, one ZeRO-3 step with reuse."""
    points = torch.randn(300, 80, generator=torch.Generator().manual_seed(0))
    budgets = torch.tensor([200])
    expected = farthest_point(points, budgets, first=0)
    found = farthest_point(points.to(device), budgets, first=0)
    assert torch.equal(found.picks.cpu(), expected.picks), "the op picks others than on the CPU"
    if device.type == "cuda":
        library = native.usable_cuda_library(torch.device("cuda", 0))
        assert not isinstance(library, str), library
    from tests.gpu.training_parts import one_step

    step = one_step(out / "smoke-run", "bfloat16" if not tiny else "float32")
    import torch.distributed as dist

    one = torch.ones(4, device=device)
    dist.all_reduce(one)
    assert one.tolist() == [1.0] * 4 * dist.get_world_size()
    return {"backend": dist.get_backend(), "loss": step["loss"], "forward": step["forward"]}


def rates(device: torch.device, tiny: bool, out: Path) -> dict[str, Any]:
    """The ceilings that everything else is held against, and what is installed."""
    size = 2**20 if tiny else 2**31
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = milliseconds(lambda: target.copy_(source), device, 5)
    n = 256 if tiny else 8192
    facts: dict[str, Any] = {"copy_tb_s": 2 * size / copied / 1e9}
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, dtype in (("sgemm", torch.float32), ("bf16", torch.bfloat16)):
        square = torch.randn(n, n, device=device).to(dtype)
        took = milliseconds(lambda s=square: s @ s, device, 5)
        facts[f"{name}_tflop_s"] = 2 * n**3 / took / 1e9
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"sms": properties.multi_processor_count, "gib": properties.total_memory / 2**30}
        driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which("nvidia-smi"):
            told = subprocess.run(driver, capture_output=True, text=True, check=False).stdout
            facts["driver"] = told.split("\n", 1)[0].strip()
    return facts | describe(device)


def kernel(device: torch.device, tiny: bool, out: Path) -> dict[str, Any]:
    """pytest -m "gpu and not slow" tests/gpu; on a CPU the same kernels emulated."""
    where = ["-m", "gpu and not slow", "tests/gpu"]
    if device.type == "cpu":
        where = ["tests/ops/test_farthest_point_cuda.py", "-k", "131 or spares"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    last = done.stdout.strip().rsplit("\n", 1)[-1]
    assert done.returncode == 0, last
    return {"passed": int(last.split(" passed")[0].split()[-1])}


def sanitizer(device: torch.device, tiny: bool, out: Path) -> dict[str, Any]:
    """csrc/tests/device.cu alone, then under each tool of compute-sanitizer."""
    build = runpy.run_path(str(ROOT / "csrc" / "build.py"))
    nvcc = build["find_nvcc"]() if device.type == "cuda" else None
    if device.type == "cuda" and nvcc is None:
        raise Skip("there is no nvcc to build the driver with")
    driver = out.resolve() / "device"
    build["build_device_driver"](driver, nvcc)
    subprocess.run([driver], check=True)
    facts: dict[str, Any] = {"alone": "ok"}
    tool = shutil.which("compute-sanitizer") if device.type == "cuda" else None
    for name in ("memcheck", "synccheck", "racecheck") if tool else ():
        command = [str(tool), "--tool", name, "--error-exitcode=9", str(driver)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout[-3000:])
        facts[name] = "ok" if done.returncode == 0 else f"ended_with_{done.returncode}"
    assert set(facts.values()) == {"ok"}, facts
    return facts if tool else facts | {"compute-sanitizer": "not_there"}


def timings(device: torch.device, tiny: bool, out: Path) -> dict[str, Any]:
    """The op, and each of its kernels, against the rate of a float32 matrix product."""
    n = 600 if tiny else 16384
    square = torch.randn(n // 2, n // 2, device=device)
    torch.backends.cuda.matmul.allow_tf32 = False
    rate = (n // 2) ** 3 / (milliseconds(lambda: square @ square, device, 3) / 1e3)
    cases = []
    for size, d in [(600, 64)] if tiny else [(4096, 512), (n, 64), (n, 512), (n, 4096)]:
        points = torch.randn(size, d, device=device)
        for strata in (1, 8):
            ids = None if strata == 1 else torch.arange(size) % strata
            budgets = torch.full((strata,), int(KEEP * size) // strata)

            def call(p: Any = points, b: Any = budgets, s: Any = ids) -> Any:
                return farthest_point(p, b, s, first=0)

            took = milliseconds(call, device, 2 if tiny else 5)
            # Two instructions a pair and dimension: half the rate of a matrix product.
            roofline = 1e3 * PAIRS * size * size * d / (rate / 2)
            case = {"n": size, "d": d, "strata": strata, "ms": took, "ratio": took / roofline}
            case["kernels"] = kernels_of(call, device)
            cases.append(case)
            print(json.dumps(case), flush=True)
    largest = max(cases, key=lambda c: (c["n"], c["d"] == 512, -c["strata"]))
    named = {f"ms_{largest['n']}x{largest['d']}": largest["ms"], "ratio": largest["ratio"]}
    return {**named, "tmadds": rate / 1e12, "cases": cases}


def kernels_of(call: Callable[[], Any], device: torch.device) -> dict[str, dict[str, float]]:
    """Of one call: launches and milliseconds by kernel; {} on a CPU."""
    if device.type == "cpu":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    found = {}
    for event in seen.key_averages():
        name = event.key.rpartition("::")[2].partition("(")[0]
        found[name] = {"launches": event.count, "ms": event.self_device_time_total / 1e3}
    return found


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median of `repeats` calls after two that do not count, by the device's own clock."""
    times = []
    for _ in range(repeats + 2):
        if device.type == "cpu":
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


PARTS = {part.__name__: part for part in (smoke, rates, kernel, sanitizer, timings)}


def find(part: str) -> Callable[[torch.device, bool, Path], dict[str, Any]]:
    """Those that train lie elsewhere: what they import takes seconds."""
    if part in PARTS:
        return PARTS[part]
    from tests.gpu import training_parts

    found: Callable[[torch.device, bool, Path], dict[str, Any]] = getattr(training_parts, part)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    try:
        device = torch.device(options.device)
        facts = find(options.part)(device, options.tiny, options.out)
        facts["status"] = "PASS"
    except Skip as reason:
        facts = {"status": "SKIP", "why": str(reason)}
    except BaseException as error:  # whatever it is, the other parts go on
        traceback.print_exc()
        line = (str(error).splitlines() or [type(error).__name__])[0]
        facts = {"status": "FAIL", "error": line[:199]}
    (options.out / f"{options.part}.json").write_text(json.dumps(facts, indent=1))
    sys.stdout.flush()
    os._exit(0)  # no handler of a library waits for other ranks


if __name__ == "__main__":
    main()
