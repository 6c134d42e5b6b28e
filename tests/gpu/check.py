"""Everything that only a GPU can tell, in eight minutes, part by part.

    python3 tests/gpu/check.py --out DIR [--parts smoke,kernel,...] [--pack FOLDER]
    python3 tests/gpu/check.py --out DIR --device cpu --tiny   all of it on a CPU, as the tests do

Every part is a process with a time limit of its own and goes on where another has failed; only
after `smoke` there is nothing to go on to. Each prints one line,

    GPU-CHECK part PASS|FAIL|SKIP key=value ...

and leaves DIR/part.json; a table comes last. The exit status is 0 where nothing has failed. Nothing
is fetched: what the machine's Python lacks lies in the folder that `make gpu-pack` makes. Only this
file's own imports must be there, and torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Seconds that each may take. To be left out first, where time is short: the last, then racecheck of
# `sanitizer` (--tools), D = 4,096 of `timings` (--widths). Never `kernel`, `timings` and `step`.
LIMITS = {
    "smoke": 90,
    "rates": 30,
    "kernel": 120,
    "sanitizer": 90,
    "timings": 90,
    "attention": 45,
    "parity": 150,
    "step": 200,
    "peers": 150,
    "smollm2": 200,
}


class Skip(Exception):
    """Raised by a part: what it works on is not on the machine, and what that is."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", default=",".join(LIMITS), help="which, in their order")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of seconds on a CPU")
    parser.add_argument("--pack", type=Path, help="what make gpu-pack has made")
    parser.add_argument("--limit-factor", type=float, default=1.0, help="times every limit")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(LIMITS):
        parser.error(f"no parts {sorted(unknown)}; there are {', '.join(LIMITS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    environ = environment(options)
    rows = []
    for part in parts:
        command = [sys.executable, "-m", "tests.gpu.parts", part, "--out", str(options.out)]
        command += ["--device", options.device, *(["--tiny"] if options.tiny else [])]
        result = run_part(part, command, LIMITS[part] * options.limit_factor, environ, options.out)
        rows.append(result)
        facts = " ".join(f"{k}={show(v)}" for k, v in result["facts"].items() if flat(v))
        print(f"GPU-CHECK {part} {result['status']} s={result['s']:.1f} {facts}", flush=True)
        if part == "smoke" and result["status"] == "FAIL":
            print("GPU-CHECK nothing else can work: stopped", flush=True)
            break
    print("\n| part | | s |\n| --- | --- | --- |")
    for row in rows:
        print(f"| {row['part']} | {row['status']} | {row['s']:.1f} |")
    return 1 if any(row["status"] == "FAIL" for row in rows) else 0


def run_part(
    part: str, command: list[str], limit_s: float, environ: dict[str, str], out: Path
) -> dict[str, Any]:
    """The part's result, also where it died or was stopped; its output in out/part.log."""
    file, log = out / f"{part}.json", out / f"{part}.log"
    file.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=stream, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, 9)  # the part and whatever it has started
            process.wait()
    facts: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    status = facts.pop("status", "FAIL")
    if code is None:
        status, facts["error"] = "FAIL", f"stopped after {limit_s:g} s"
    elif code != 0 and status != "FAIL":
        status, facts["error"] = "FAIL", f"ended with {code}"
    if status == "FAIL":
        facts.setdefault("error", "nothing was reported")
        print(f"--- the end of {log}\n" + "\n".join(log.read_text().splitlines()[-15:]), flush=True)
    result = {"part": part, "status": status, "s": time.monotonic() - start, "facts": facts}
    file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def environment(options: argparse.Namespace) -> dict[str, str]:
    """What the parts run with; the pack's wheels and libraries put in place."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environ.setdefault("OMP_NUM_THREADS", "1" if options.tiny else "8")
    environ.setdefault("TORCH_EXTENSIONS_DIR", str(options.out.resolve() / "torch_extensions"))
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if options.pack:
        site = options.out.resolve() / "site"
        if not site.is_dir():
            wheels = [str(wheel) for wheel in sorted(options.pack.glob("*.whl"))]
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
            subprocess.run([*pip, "--no-compile", "--target", str(site), *wheels], check=True)
        for library in options.pack.glob("_slap_fps*.so"):
            if not (target := ROOT / "slap_ds" / "ops" / library.name).exists():
                shutil.copy(library, target)
        if (model := options.pack / "smollm2").is_dir():
            environ.setdefault("SLAP_SMOLLM2", str(model.resolve()))
        path.insert(1, str(site))
    if options.device == "cpu":
        environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if options.tiny:  # DeepSpeed imports an optimizer that is compiled, which takes seconds
        environ["TORCHDYNAMO_DISABLE"] = "1"
    environ["PYTHONPATH"] = os.pathsep.join(path)
    return environ


def flat(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and len(str(value)) < 200


def show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace(" ", "_")


if __name__ == "__main__":
    sys.exit(main())
