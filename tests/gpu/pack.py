"""What a bare machine needs for tests/gpu/check.py, fetched here: nothing can be fetched there.

    python tests/gpu/pack.py --to .cache/gpu-pack [--model FOLDER]

The machine has Python 3.12, torch and transformers. Added are DeepSpeed (built here as a wheel
without compiled operators), what else slap_ds and its tests import, and the libraries of csrc/.
--model adds SmolLM2 as examples/convert_smollm2.py leaves it, in bfloat16: 270 MB.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What slap_ds and DeepSpeed import beside torch, transformers and numpy; then what the tests do.
NAMES = ["hjson", "pydantic", "pydantic-core", "annotated-types", "typing-inspection"]
NAMES += ["typing-extensions", "msgpack", "py-cpuinfo", "psutil", "einops", "ninja", "accelerate"]
NAMES += ["pytest", "pytest-timeout", "pluggy", "iniconfig", "hypothesis", "sortedcontainers"]
PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]
LIMIT_MIB = 10.0  # without the model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--to", type=Path, default=ROOT / ".cache" / "gpu-pack")
    parser.add_argument("--model", type=Path, help="a converted SmolLM2, to be packed too")
    options = parser.parse_args()
    folder = options.to
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip"]
    known = locked()
    # Beside this environment's torch, and without operators: a wheel of any Python and machine.
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    environ = {**os.environ, "DS_BUILD_OPS": "0"}
    subprocess.run([*pip, *build, known["deepspeed"]], check=True, env=environ)
    target = ["--python-version", "3.12", "--implementation", "cp"]
    target += [word for name in PLATFORMS for word in ("--platform", name)]
    fetch = [*pip, "download", "-q", "--no-deps", "--only-binary=:all:", *target, "-d", str(folder)]
    subprocess.run([*fetch, "gguf==0.19.0", *(known[name] for name in NAMES)], check=True)
    subprocess.run([sys.executable, "csrc/build.py", "--to", str(folder)], cwd=ROOT, check=True)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    if options.model:
        pack_model(options.model, folder / "smollm2")
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file.name}")
    print(f"{size:8.2f} MiB  without the model (at most {LIMIT_MIB:g})")
    if size > LIMIT_MIB:
        sys.exit("the pack is too large: see what has grown")


def locked() -> dict[str, str]:
    """Name -> `name==version`: those of the lock, of its newest Pythons where they differ."""
    text = "".join((ROOT / "requirements" / f"{name}.txt").read_text() for name in ("run", "test"))
    return {line.split("==")[0]: line for line in re.findall(r"^[\w.-]+==[\w.]+", text, re.M)}


def pack_model(source: Path, target: Path) -> None:
    """In bfloat16 and in files of at most 50 MB, which any transfer takes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target, max_shard_size="50MB")
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


if __name__ == "__main__":
    main()
