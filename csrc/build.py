"""Builds the native libraries of `csrc/`: a C++ compiler is enough, PyTorch is not needed.

Used by setup.py, by the tests and, as a script, by hand:

    python csrc/build.py                the libraries into slap_ds/ops/ (CUDA too, with nvcc)
    python csrc/build.py --asan FILE    the AddressSanitizer driver of csrc/tests/
    python csrc/build.py --device FILE  the driver of csrc/tests/ for compute-sanitizer
    python csrc/build.py --no-cuda      the CPU library only

Every source is compiled every time: a build folder kept by pip must not ship an older library.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
CPU_LIBRARY = "_slap_fps.so"
CUDA_LIBRARY = "_slap_fps_cuda.so"

# No fast-math and no contraction: where a multiply and an add are fused is part of the contract.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]
# GCC 12 warns about its own AVX-512 headers otherwise.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Flags of each source, by the machine it is built on; other machines get the portable kernels.
SOURCES = {
    "farthest_point.cpp": [],
    "kernels_portable.cpp": [],
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "kernels_avx512.cpp": [*AVX512, *QUIET],
    "kernels_vnni.cpp": [*AVX512, "-mavx512vnni", *QUIET],
}
X86 = ("x86_64", "amd64")

# Code for A100, H100 and B200, and PTX for whatever comes later. Contraction is off here too.
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_100,code=sm_100",
    "-gencode=arch=compute_100,code=compute_100",
]

# Without fortification: its longjmp takes a jump to another stack for an error.
EMULATION_FLAGS = ["-O2", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-DSLAP_CUDA_EMULATION"]
if platform.machine().lower() in X86:
    EMULATION_FLAGS.append("-mfma")


class BuildError(Exception):
    """A compiler is missing or refuses."""


def find_cxx() -> str:
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "c++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise BuildError(
        f"no C++ compiler (tried {named or 'g++, c++, clang++'}); install one or set CXX"
    )


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else of PATH; PyTorch is not asked, a CPU-only build denies having one."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home, "bin", "nvcc"))) if home else shutil.which("nvcc")


def run(command: list[str]) -> str:
    """The command's standard error; BuildError, with its end, where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = (done.stderr or done.stdout)[-3000:]
        raise BuildError(f"{' '.join(command)}\nended with {done.returncode}:\n{tail}")
    return done.stderr


def build_cpu(target: Path, extra_flags: tuple[str, ...] = (), main: Path | None = None) -> None:
    """Compile and link the CPU library, or, with `main`, a program that holds it."""
    cxx = find_cxx()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    x86 = platform.machine().lower() in X86
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [*CXX_FLAGS, *extra_flags]
        jobs = [(CSRC / "cpu" / source, flags if x86 else []) for source, flags in SOURCES.items()]
        if main is not None:
            jobs.append((main, []))
        objects = [str(folder / f"{source.stem}.o") for source, _ in jobs]

        def compile_one(job: tuple[tuple[Path, list[str]], str]) -> None:
            (source, flags), out = job
            run([cxx, *common, *flags, "-c", str(source), "-o", out])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, zip(jobs, objects, strict=True)))
        link = [] if main is not None else ["-shared"]
        run([cxx, *common, *link, *objects, "-o", str(target)])


def build_cuda(nvcc: str, target: Path) -> str:
    """Compile the CUDA library; returns the assembler's report (registers, spills)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    source = CSRC / "cuda" / "farthest_point.cu"
    flags = ["-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static", "-Xptxas=-v"]
    return run([nvcc, *CUDA_FLAGS, *flags, str(source), "-o", str(target)])


def build_emulation(target: Path) -> None:
    """The CUDA library with its kernels run by the CPU, for tests where there is no GPU."""
    source = str(CSRC / "cuda" / "farthest_point.cu")
    flags = [*CXX_FLAGS, *EMULATION_FLAGS, "-shared"]
    run([find_cxx(), *flags, "-x", "c++", source, "-o", str(target)])


def build_device_driver(target: Path, nvcc: str | None) -> None:
    """csrc/tests/device.cu, for compute-sanitizer; without nvcc with its kernels emulated."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = str(CSRC / "tests" / "device.cu")
    if nvcc is not None:
        run([nvcc, *CUDA_FLAGS, "-lineinfo", "-cudart=static", source, "-o", str(target)])
    else:
        run([find_cxx(), *CXX_FLAGS, *EMULATION_FLAGS, "-x", "c++", source, "-o", str(target)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the native libraries of csrc/.")
    parser.add_argument("--to", type=Path, default=CSRC.parent / "slap_ds" / "ops")
    parser.add_argument("--asan", type=Path, metavar="FILE", help="build the sanitizer driver only")
    parser.add_argument("--device", type=Path, metavar="FILE", help="build the GPU's driver only")
    parser.add_argument("--no-cuda", action="store_true", help="leave out the CUDA library")
    options = parser.parse_args()
    try:
        if options.asan:
            flags = ("-g", "-O2", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
            build_cpu(options.asan, flags, CSRC / "tests" / "bounds.cpp")
            return
        if options.device:
            build_device_driver(options.device, None if options.no_cuda else find_nvcc())
            return
        build_cpu(options.to / CPU_LIBRARY)
        if (nvcc := find_nvcc()) and not options.no_cuda:
            build_cuda(nvcc, options.to / CUDA_LIBRARY)
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
