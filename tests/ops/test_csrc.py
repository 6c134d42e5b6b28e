"""Building `csrc/`: with and without compilers, from a stale tree, for the GPU, sanitized."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
build = runpy.run_path(str(ROOT / "csrc" / "build.py"))
NVCC = build["find_nvcc"]()

needs_cxx = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "c++", "clang++")), reason="no C++ compiler"
)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@needs_cxx
@pytest.mark.slow
def test_no_access_out_of_bounds(tmp_path: Path) -> None:
    program = tmp_path / "bounds"
    subprocess.run(
        [sys.executable, ROOT / "csrc" / "build.py", "--asan", program], check=True, timeout=240
    )
    done = subprocess.run([program], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("ok\n")


def test_kernel_files_hold_no_code_of_the_standard_library() -> None:
    """The linker keeps one copy of a template, perhaps the one this processor cannot run."""
    for source in [*build["SOURCES"], "avx512_exact.h", "kernels.h"]:
        if source == "farthest_point.cpp":
            continue
        text = (ROOT / "csrc" / "cpu" / source).read_text()
        code = re.sub(r"//[^\n]*", "", text)
        assert "std::" not in code, source
        includes = set(re.findall(r"#include\s+([<\"][^>\"]+)", code))
        assert includes <= {"<stdint.h", "<immintrin.h", '"kernels.h', '"avx512_exact.h'}, source


@needs_cxx
def test_the_driver_of_the_gpu_kernels_emulated(tmp_path: Path) -> None:
    """What compute-sanitizer is to watch on a GPU runs, agrees with a plain loop, stays inside."""
    build["build_device_driver"](tmp_path / "device", None)
    done = subprocess.run([tmp_path / "device"], capture_output=True, text=True, timeout=120)
    assert done.stdout == "8 shapes\nok\n", done.stderr


@needs_nvcc
def test_the_gpu_kernels_compile_without_spills(tmp_path: Path) -> None:
    report = build["build_cuda"](NVCC, tmp_path / "_slap_fps_cuda.so")
    for target in ("sm_80", "sm_90", "sm_100"):
        assert f"for '{target}'" in report
    functions = re.findall(r"Compiling entry function", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= len(functions) >= 2
    assert all(pair == ("0", "0") for pair in spills), report
    assert sm_residents(report, "Shrink", "sm_90") >= 3, "a round's blocks fill no H100 evenly"


def sm_residents(report: str, kernel: str, target: str) -> int:
    """Blocks of 128 threads that one SM holds at once, by the assembler's registers and memory."""
    part = re.search(
        rf"function '\w*\d{kernel}E\w*' for '{target}'(.*?)(?:Compiling|\Z)", report, re.S
    )
    assert part is not None
    (registers,) = re.findall(r"Used (\d+) registers", part[1])
    (shared,) = re.findall(r"(\d+) bytes smem", part[1])
    return min(65536 // (128 * int(registers)), 227 * 1024 // (int(shared) + 1024))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a source distribution of the op would hold, and a library of yesterday."""
    copy = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    shutil.copytree(
        ROOT / "slap_ds" / "ops",
        copy / "slap_ds" / "ops",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    shutil.copy(ROOT / "slap_ds" / "__init__.py", copy / "slap_ds")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").write_text("")
    (copy / "slap_ds" / "ops" / "_slap_fps.so").write_text("of yesterday")
    return copy


def wheel(tree: Path, compilers: list[Path], **environ: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel with only these programs to be found, in the environment of an installer."""
    bin_folder = tree.parent / "bin"
    bin_folder.mkdir(exist_ok=True)
    for program in compilers:
        (bin_folder / program.name).unlink(missing_ok=True)
        (bin_folder / program.name).symlink_to(program)
    kept = {key: value for key, value in os.environ.items() if key not in ("CXX", "CUDA_HOME")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", tree.parent / "dist"],
        cwd=tree,
        env=kept | {"PATH": str(bin_folder)} | environ,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def libraries(tree: Path) -> dict[str, bytes]:
    (path,) = (tree.parent / "dist").glob("*.whl")
    assert re.fullmatch(r"slap_ds-[\w.]+-py3-none-[\w.]+\.whl", path.name)
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        assert "slap_ds/ops/native.py" in archive.namelist()
        return {Path(name).name: archive.read(name) for name in names}


def cxx_tools() -> list[Path]:
    return [Path(found) for name in ("g++", "as", "ld") if (found := shutil.which(name))]


def test_without_a_compiler_one_warning_and_no_library(tree: Path) -> None:
    done = wheel(tree, [])
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"WARNING: slap_ds", done.stderr)) == 1
    assert "no C++ compiler" in done.stderr
    assert libraries(tree) == {}, "a library of yesterday was shipped"


def test_required_without_a_compiler_is_an_error(tree: Path) -> None:
    done = wheel(tree, [], SLAP_BUILD="require")
    assert done.returncode != 0
    assert "slap_ds.ops._slap_fps was not built" in done.stderr
    assert "install one or set CXX" in done.stderr


def break_source(tree: Path) -> None:
    (tree / "csrc" / "cpu" / "kernels_portable.cpp").write_text("no C++")


def keep(tree: Path) -> None:
    """Leaves the tree as it is."""


@needs_cxx
@pytest.mark.parametrize(("change", "built"), [(keep, True), (break_source, False)])
def test_with_a_cxx_compiler_only(tree: Path, change: Callable[[Path], None], built: bool) -> None:
    change(tree)
    done = wheel(tree, cxx_tools())
    assert done.returncode == 0, done.stderr
    found = libraries(tree)
    assert set(found) == ({"_slap_fps.so"} if built else set())
    assert all(content.startswith(b"\x7fELF") for content in found.values())
    assert done.stderr.count("WARNING: slap_ds") == (0 if built else 1)


@needs_cxx
@pytest.mark.slow
def test_a_kept_build_folder_ships_no_old_library(tree: Path) -> None:
    assert wheel(tree, cxx_tools()).returncode == 0
    assert set(libraries(tree)) == {"_slap_fps.so"}
    break_source(tree)
    shutil.rmtree(tree.parent / "dist")
    assert wheel(tree, cxx_tools()).returncode == 0
    assert libraries(tree) == {}


@needs_cxx
@needs_nvcc
@pytest.mark.slow
def test_with_nvcc_and_a_pytorch_that_has_no_cuda(tree: Path) -> None:
    path = os.pathsep.join((str(Path(NVCC).parent), os.environ["PATH"]))
    done = wheel(tree, [], PATH=path, SLAP_BUILD="require")
    assert done.returncode == 0, done.stderr
    assert set(libraries(tree)) == {"_slap_fps.so", "_slap_fps_cuda.so"}
