"""Farthest-point selection against everything that can be installed, alternating in one process.

    python benchmarks/bench_farthest_point.py --json benchmarks/results/farthest_point.json

Every case picks M = 0.6 N of N x D normal points. Contestants take turns, times are CPU seconds of
one thread (which other work on the machine disturbs least), medians over the repeats. Slow ones run
fewer times. Packages that are not installed are listed as missing. Picks are checked in float64.

The floor is what no exact method that looks at every pair could beat with float multiply-adds:
0.42 N^2 D of them (a pick need not be compared with earlier ones) at the rate of the fastest matrix
product of this run, or one read of the points, whichever is longer.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slap_ds.ops import active_path, farthest_point

SIZES = [(512, 64), (512, 512), (2048, 64), (2048, 512), (8192, 64), (8192, 512)]
KEEP = 0.6
PAIRS = KEEP - KEEP**2 / 2  # of N^2
Method = Callable[[Tensor, int], Tensor]  # points (N, D), M -> picks (M,)


def ours(points: Tensor, m: int) -> Tensor:
    return farthest_point(points, torch.tensor([m]), first=0).picks


def torch_direct(points: Tensor, m: int) -> Tensor:
    """One pass over the points a pick."""
    return _rows(points, m, lambda i: (points - points[i]).square().sum(1))


def torch_gram(points: Tensor, m: int) -> Tensor:
    """All distances by one matrix product, then a row a pick."""
    norms = points.square().sum(1)
    squared = norms[:, None] + norms[None, :] - 2.0 * (points @ points.T)
    return _rows(points, m, lambda i: squared[i])


def torch_gram_in_place(points: Tensor, m: int) -> Tensor:
    """The same with fewer passes over the (N, N) matrix: the norms are added to the rows in use."""
    norms = points.square().sum(1)
    product = points @ points.T
    return _rows(points, m, lambda i: torch.add(norms, product[i], alpha=-2.0).add_(norms[i]))


def torch_cdist(points: Tensor, m: int) -> Tensor:
    distance = torch.cdist(points, points)
    return _rows(points, m, lambda i: distance[i])


def _rows(points: Tensor, m: int, row: Callable[[int], Tensor]) -> Tensor:
    nearest = torch.full((len(points),), float("inf"))
    picks, pick = [], 0
    for _ in range(m):
        picks.append(pick)
        torch.minimum(nearest, row(pick), out=nearest)
        nearest[pick] = -1.0
        pick = int(nearest.argmax())
    return torch.tensor(picks)


def fpsample(points: Tensor, m: int) -> Tensor:
    module = importlib.import_module("fpsample")
    return torch.as_tensor(module.fps_sampling(points.numpy(), m, start_idx=0).astype("int64"))


def k_center(points: Tensor, m: int) -> Tensor:
    module = importlib.import_module("k_center")
    return torch.as_tensor(module.KCenter(n_clusters=m).fit(points.numpy()).center_indices_)


def scikit_matter(points: Tensor, m: int) -> Tensor:
    module = importlib.import_module("skmatter.sample_selection")
    selector = module.FPS(initialize=0, n_to_select=m).fit(points.numpy())
    return torch.as_tensor(selector.selected_idx_)


def torch_quickfps(points: Tensor, m: int) -> Tensor:
    return importlib.import_module("torch_quickfps").sample_idx(points, m, start_idx=0)


def torch_cluster(points: Tensor, m: int) -> Tensor:
    module = importlib.import_module("torch_cluster")
    return module.fps(points, ratio=m / len(points), random_start=False)


def pytorch3d(points: Tensor, m: int) -> Tensor:
    module = importlib.import_module("pytorch3d.ops")
    return module.sample_farthest_points(points[None], K=m)[1][0]


COMPOSITIONS = {f.__name__: f for f in (torch_direct, torch_gram, torch_gram_in_place, torch_cdist)}
PACKAGES = {
    f.__name__: f
    for f in (fpsample, k_center, scikit_matter, torch_quickfps, torch_cluster, pytorch3d)
}


def cpu_seconds(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def greedy_share(points: Tensor, picks: Tensor) -> float:
    """The share of picks that were a farthest point, to 1e-5, given those before it."""
    wide = points.double()
    norms = wide.square().sum(1)
    nearest = torch.full((len(points),), float("inf"), dtype=torch.float64)
    right = 1
    for begin in range(0, len(picks), 256):
        rows = wide[picks[begin : begin + 256]]
        squared = rows.square().sum(1)[:, None] + norms[None, :] - 2.0 * (rows @ wide.T)
        for row, pick in zip(squared, picks[begin : begin + 256].tolist(), strict=True):
            if not nearest.isinf().all():
                right += int(nearest[pick] >= nearest.max() * (1.0 - 1e-5))
            torch.minimum(nearest, row.clamp_(min=0.0), out=nearest)
            nearest[pick] = -1.0
    return right / len(picks)


def machine_rates() -> tuple[float, float]:
    """Multiply-adds and bytes a second, one thread: the best of a few tries."""
    a = torch.randn(2048, 2048)
    big = torch.randn(1 << 26)
    product = min(cpu_seconds(lambda: a @ a) for _ in range(5))
    read = min(cpu_seconds(big.sum) for _ in range(5))
    return 2048**3 / product, big.numel() * 4 / read


def run_case(n: int, d: int, repeats: int, budget_s: float) -> dict[str, Any]:
    """Rounds of one run each; a method that has used its share of the budget sits out."""
    points = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    m = int(KEEP * n)
    methods: dict[str, Method] = {"ours": ours, **COMPOSITIONS, **PACKAGES}
    times: dict[str, list[float]] = {}
    checks: dict[str, dict[str, float]] = {}
    missing: dict[str, str] = {}
    for _ in range(repeats):
        for name, method in methods.items():
            spent = sum(times.get(name, ()))
            if name in missing or (spent > budget_s and name != "ours"):
                continue
            picks: list[Tensor] = []
            try:
                took = cpu_seconds(lambda m_=method, out=picks: out.append(m_(points, m)))
            except ImportError as error:
                missing[name] = str(error)
                continue
            times.setdefault(name, []).append(took)
            if name not in checks:
                checks[name] = {
                    "greedy_share": round(greedy_share(points, picks[0]), 4),
                    "distinct": int(picks[0].unique().numel()),
                }
    rate, bandwidth = machine_rates()
    floor_s = max(PAIRS * n * n * d / rate, 4.0 * n * d / bandwidth)
    median = {name: statistics.median(values) for name, values in times.items()}

    def best(names: dict[str, Method]) -> dict[str, Any] | None:
        there = [name for name in names if name in median]
        if not there:
            return None
        name = min(there, key=median.__getitem__)
        ratio = median[name] / median["ours"]
        return {"name": name, "ms": round(1e3 * median[name], 3), "ratio": round(ratio, 2)}

    return {
        "n": n,
        "d": d,
        "m": m,
        "ms": round(1e3 * median["ours"], 3),
        "best_package": best(PACKAGES),
        "best_torch": best(COMPOSITIONS),
        "floor_ms": round(1e3 * floor_s, 3),
        "floor_ratio": round(median["ours"] / floor_s, 3),
        "sgemm_gmadds": round(rate / 1e9, 1),
        "read_gbytes": round(bandwidth / 1e9, 1),
        "all_ms": {name: round(1e3 * value, 3) for name, value in median.items()},
        "runs": {name: len(values) for name, values in times.items()},
        "checks": checks,
        "missing": missing,
    }


def environment() -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
        named = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        numbers = ("cpu family", "model", "stepping")
        numbered = [f"{key} {named[key]}" for key in numbers if key in named]
        cpu = ", ".join([named.get("model name", cpu), *numbered])
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        distribution = "skmatter" if name == "scikit_matter" else name.replace("_", "-")
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"cpu": cpu, "threads": 1, "commit": commit, "versions": versions, "path": active_path()}


def _three_digits(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def table(cases: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for case in cases for name in case["all_ms"]))
    lines = ["| ms | " + " | ".join(f"{case['n']}×{case['d']}" for case in cases) + " |"]
    lines.append("| --- |" + " --- |" * len(cases))
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        (name, lambda case, name=name: _three_digits(case["all_ms"].get(name))) for name in names
    ]
    for title, key in (
        ("best package / ours", "best_package"),
        ("best torch / ours", "best_torch"),
    ):
        rows.append((title, lambda case, k=key: f"{case[k]['ratio']:.1f}" if case[k] else "-"))
    rows.append(("ours / floor", lambda case: f"{case['floor_ratio']:.2f}"))
    for title, cell in rows:
        lines.append(f"| {title} | " + " | ".join(cell(case) for case in cases) + " |")
    return "\n".join(lines)


def plot(cases: list[dict[str, Any]]) -> str:
    """An SVG bar chart on a logarithmic axis, written by hand: no plotting package is needed."""
    import math

    names = list(dict.fromkeys(name for case in cases for name in case["all_ms"]))
    colours = ["#d62728", "#9ecae1", "#6baed6", "#4292c6", "#2171b5"]
    colours += ["#a1d99b", "#74c476", "#41ab5d", "#238b45", "#005a32", "#00441b"]
    values = [value for case in cases for value in case["all_ms"].values()]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    bar, gap, height = 13, 26, 320
    group = bar * len(names) + gap
    width = 60 + group * len(cases)

    def y(ms: float) -> float:
        return 20 + height * (1 - (math.log10(ms) - low) / (high - low))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 90}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height + 90}" fill="white"/>',
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="50" x2="{width}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="45" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g} ms</text>')
    for i, case in enumerate(cases):
        left = 60 + i * group
        for j, name in enumerate(names):
            if name in case["all_ms"]:
                top = y(case["all_ms"][name])
                parts.append(
                    f'<rect x="{left + j * bar}" y="{top:.1f}" width="{bar - 2}" '
                    f'height="{20 + height - top:.1f}" fill="{colours[j % len(colours)]}"/>'
                )
        at = y(case["floor_ms"]) if case["floor_ms"] > 10.0**low else 20 + height
        right = left + bar * len(names)
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="black" '
            'stroke-dasharray="4 3"/>'
        )
        middle = left + bar * len(names) / 2
        label = f"{case['n']}×{case['d']}"
        parts.append(f'<text x="{middle}" y="{height + 38}" text-anchor="middle">{label}</text>')
    for j, name in enumerate([*names, "floor (dashed)"]):
        x, row = 60 + (j % 6) * 130, height + 56 + (j // 6) * 16
        if j < len(names):
            colour = colours[j % len(colours)]
            parts.append(f'<rect x="{x}" y="{row - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="{row}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--svg", type=Path, help="draw them here")
    parser.add_argument("--sizes", nargs="+", metavar="NxD", help="cases, such as 512x64")
    parser.add_argument("--repeats", type=int, default=9, help="rounds a case")
    parser.add_argument("--budget-s", type=float, default=3.0, help="CPU seconds a method and case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["RAYON_NUM_THREADS"] = "1"  # read when the Rust packages are first used
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes or []] or SIZES
    farthest_point(
        torch.randn(256, 32), torch.tensor([99]), first=0
    )  # loads and measures the paths
    cases = []
    for n, d in sizes:
        cases.append(run_case(n, d, options.repeats, options.budget_s))
        print(json.dumps(cases[-1]), flush=True)
    print(table(cases))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"environment": environment(), "cases": cases}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.svg:
        options.svg.write_text(plot(cases))


if __name__ == "__main__":
    main()
