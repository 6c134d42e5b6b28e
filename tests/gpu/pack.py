"""What a bare machine needs for tests/gpu/check.py, fetched here: nothing can be fetched there.

    python tests/gpu/pack.py --to .cache/gpu-pack [--model FOLDER]

The machine has Python 3.12, torch and transformers. Added are DeepSpeed (built here as a wheel
without compiled operators), what else slap_ds and its tests import, and the libraries of csrc/.
--model adds SmolLM2 as examples/convert_smollm2.py leaves it, in bfloat16: 270 MB.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = "deepspeed==0.19.8"
# What slap_ds and DeepSpeed import beside torch, transformers and numpy; then what the tests do.
NAMES = ["hjson", "pydantic", "annotated-types", "typing-inspection", "typing-extensions"]
NAMES += ["msgpack", "py-cpuinfo", "psutil", "einops", "ninja", "gguf==0.19.0", "accelerate"]
NAMES += ["pytest", "pluggy", "iniconfig", "hypothesis", "sortedcontainers"]
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
    # Beside this environment's torch, and without operators: a wheel of any Python and machine.
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), DEEPSPEED]
    subprocess.run([*pip, *build], check=True, env=environment())
    target = ["--python-version", "3.12", "--implementation", "cp"]
    target += [word for name in PLATFORMS for word in ("--platform", name)]
    fetch = [*pip, "download", "-q", "--no-deps", "--only-binary=:all:", *target, "-d", str(folder)]
    subprocess.run([*fetch, *NAMES], check=True)
    (core,) = [
        line.split(";")[0].strip()
        for line in requires_of(next(folder.glob("pydantic-*.whl")))
        if line.startswith("pydantic-core")
    ]
    subprocess.run([*fetch, core], check=True)
    subprocess.run([sys.executable, "csrc/build.py", "--to", str(folder)], cwd=ROOT, check=True)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    if options.model:
        pack_model(options.model, folder / "smollm2")
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file.name}")
    print(f"{size:8.2f} MiB  without the model (at most {LIMIT_MIB:g})")
    if size > LIMIT_MIB:
        sys.exit("the pack is too large: see what has grown")


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "DS_BUILD_OPS": "0"}


def requires_of(wheel: Path) -> list[str]:
    """Requires-Dist of a wheel that is not installed."""
    import zipfile
    from email.parser import Parser

    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []


def pack_model(source: Path, target: Path) -> None:
    """In bfloat16 and in files of at most 50 MB, which any transfer takes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target, max_shard_size="50MB")
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


if __name__ == "__main__":
    main()
