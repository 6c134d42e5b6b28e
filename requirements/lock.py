"""Writes the lock: all that `make` installs, by version and hash, for Python 3.10 to 3.13.

    pyproject.toml + torch.txt -> uv, in an environment thrown away afterwards -> four files

    build.txt   pip and setuptools, installed first: they build what comes as source
    run.txt     what training needs, beside torch (torch.txt)
    test.txt    what the tests need beyond that
    docs.txt    what `make site` needs beyond run.txt

Usage: python requirements/lock.py, or `make lock`.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
UV = "uv==0.13.9"
BUILD = ["pip", "setuptools"]
# torch brings these, and only a CUDA build does: they are pinned by its own metadata.
WITH_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
HEAD = "# Written by `make lock`; {}.\n"


def main() -> None:
    """The files are written when all resolutions have succeeded."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "venv", scratch], check=True)
        subprocess.run([f"{scratch}/bin/pip", "install", "-qq", UV], check=True)
        everything = resolve(scratch, ["--extra", "test"], HERE / "torch.txt")
        whole = Path(scratch) / "whole.txt"
        whole.write_text("".join(entry for entries in everything.values() for entry in entries))
        run = resolve(scratch, [], whole)
        docs = resolve(scratch, ["--extra", "docs"], whole)
    files = {
        "build.txt": ("what builds packages from source", BUILD, run),
        "run.txt": ("what training needs, beside torch", run.keys() - {*BUILD}, run),
        "test.txt": ("what the tests need beyond run.txt", beyond(everything, run), everything),
        "docs.txt": ("what `make site` needs beyond run.txt", beyond(docs, run), docs),
    }
    for file, (title, names, found) in files.items():
        entries = [entry for name in sorted(names) for entry in found[name]]
        if any("://" in entry for entry in entries):
            raise SystemExit(f"{file} would name a host: uv was told to write addresses")
        (HERE / file).write_text(HEAD.format(title) + "".join(entries))
        print(f"requirements/{file}: {len(names)} packages")


def beyond(found: dict[str, list[str]], run: dict[str, list[str]]) -> set[str]:
    """What run.txt lacks, or holds for fewer Pythons: six, needed by all tests, by few runs."""
    return {name for name, entries in found.items() if entries != run.get(name)}


def resolve(scratch: str, extras: list[str], constraints: Path) -> dict[str, list[str]]:
    """Name -> its entries: `name==version ; marker` and hashes, one for each range of Pythons."""
    requirements = Path(scratch) / "build.in"
    requirements.write_text("\n".join(BUILD))
    command = [f"{scratch}/bin/uv", "pip", "compile", "--quiet", "--universal"]
    command += ["--python-version", "3.10", "--generate-hashes", "--no-header", "--no-annotate"]
    command += [*extras, "--constraints", str(constraints), "pyproject.toml", str(requirements)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    if done.returncode:
        raise SystemExit("no versions fit together; uv says why above")
    entries: dict[str, list[str]] = {}
    for entry in re.findall(r"^\S.*\n(?:[ \t].*\n)*", done.stdout, re.MULTILINE):
        name = entry.split("==")[0]
        if not WITH_TORCH.fullmatch(name):
            entries.setdefault(name, []).append(entry)
    return entries


if __name__ == "__main__":
    main()
