"""A store of many rows: rows a second by workers, memory, a kill half-way, the second start.

    python benchmarks/bench_store.py --rows 10000000 --json benchmarks/results/store.json
    python benchmarks/bench_store.py --rows 1000000 --make rows      # only writes rows/*.jsonl

Rows are questions and answers of random words, some 300 bytes each; the tokenizer is the demo's.
Every start is a process of its own; `cpu_s` are the seconds of all cores. `peak_pss_mib` is the
memory of all its processes, shared pages counted once; `peak_rss_mib` that of the first of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from slap_ds.bench.environment import describe
from slap_ds.data.build import build_store
from slap_ds.data.hashes import QUIET_NS
from slap_ds.data.sources import BUILTIN
from slap_ds.data.stream import CandidateStream
from slap_ds.data.templates import make_template
from slap_ds.data.writer import rows_kept
from slap_ds.models.load import load_tokenizer

FILES = 8


def main() -> None:
    options = arguments()
    if options.start:
        start(options)
    elif options.make:
        make_rows(options.make, options.rows)
    else:
        measure(options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sweep-rows", type=int, default=200_000, help="of the runs by workers")
    parser.add_argument("--workers", type=int, nargs="+", help="default: 1, 2, 4, ... all cores")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="only write the rows there")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--start", nargs=2, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_rows(folder: Path, rows: int) -> None:
    """Write `rows` rows into FILES files; the same ones every time."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = [w for w in BUILTIN["builtin:demo/train"].read_text("utf-8").split() if w.isalpha()]
    texts = [" ".join(draw.choices(words, k=16)) for _ in range(20_000)]
    for number in range(FILES):
        with (folder / f"part-{number}.jsonl").open("w", encoding="utf-8") as file:
            for i in range(number, rows, FILES):
                question, answer = draw.choice(texts), f"{draw.choice(texts)} {i}"
                messages = [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
                file.write(json.dumps({"messages": messages, "task": f"task {i % 5}"}) + "\n")


def start(options: argparse.Namespace) -> None:
    """What a run does with its data when it starts; prints what it took."""
    data, cache = options.start
    template = make_template(options.template, load_tokenizer("builtin:demo"))
    began, cpu = time.perf_counter(), time.process_time()
    store = build_store(
        [str(data)],
        format="auto",
        template=template,
        max_tokens=1024,
        over_length="truncate",
        cache_dir=cache,
        workers=options.workers and options.workers[0],
    )
    built = time.perf_counter()
    next(CandidateStream(len(store), 1024, 0, steps=1))
    first = time.perf_counter()
    cpu_s = [os.times().children_user + os.times().children_system, time.process_time() - cpu]
    print(
        json.dumps(
            {
                "store_s": built - began,
                "cpu_s": sum(cpu_s),
                "first_batch_s": first - built,
                "samples": len(store),
                "tokens": store.counts.tokens,
                "fingerprint": store.fingerprint,
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            }
        )
    )


def run(data: Path, cache: Path, workers: int | None, template: str, kill_at: int = 0) -> Any:
    """Start in another process; with `kill_at`, kill it once so many rows are finished."""
    command = [sys.executable, __file__, "--start", str(data), str(cache), "--template", template]
    command += [] if workers is None else ["--workers", str(workers)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        began = time.perf_counter()
        while job.poll() is None:
            peak = max(peak, sum(pss_bytes(psutil.Process(job.pid))))
            if kill_at and any(rows_kept(f) >= kill_at for f in cache.glob(".building-*")):
                job.kill()
                job.wait()
                (left,) = cache.glob(".building-*")
                seconds = time.perf_counter() - began
                return {"rows_kept": rows_kept(left), "s": seconds, "peak_pss_mib": peak >> 20}
            time.sleep(0.5)
        assert job.stdout is not None
        return {**json.loads(job.stdout.read()), "peak_pss_mib": peak >> 20}


def pss_bytes(process: psutil.Process) -> Iterator[int]:
    """Of a process and all below it."""
    with contextlib.suppress(psutil.Error):
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                yield each.memory_full_info().pss


def measure(options: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0))
    numbers = options.workers or sorted({2**i for i in range(6) if 2**i < cores} | {cores})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few, many = folder / "few", folder / "many"
        make_rows(few, options.sweep_rows)
        make_rows(many, options.rows)
        time.sleep(QUIET_NS / 1e9)  # hashes of newer files are not remembered
        sweep = []
        for workers in numbers:
            done = run(few, folder / f"cache {workers}", workers, options.template)
            done = {"workers": workers, **done, "rows_per_s": options.sweep_rows / done["store_s"]}
            print(json.dumps(done), flush=True)
            sweep.append(done)
        assert len({done["fingerprint"] for done in sweep}) == 1
        size = sum(path.stat().st_size for path in many.iterdir())
        result: dict[str, Any] = {"rows": options.rows, "bytes": size, "sweep": sweep}
        cache = folder / "cache"
        result["killed"] = run(many, cache, None, options.template, options.rows // 2)
        print(json.dumps(result["killed"]), flush=True)
        for step in ("continued", "second_start"):
            result[step] = run(many, cache, None, options.template)
            print(step, json.dumps(result[step]), flush=True)
        store = next(path for path in cache.iterdir() if path.is_dir())
        result["store_bytes"] = sum(path.stat().st_size for path in store.iterdir())
    result["environment"] = describe()
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
