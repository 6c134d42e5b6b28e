"""Builds csrc/ into the package; the rest of the metadata lives in pyproject.toml.

The libraries are plain C behind ctypes: no PyTorch is needed, and one wheel serves every Python.
SLAP_BUILD=require turns a failing build into an error; otherwise slap_ds falls back to PyTorch.
"""

import os
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
build = runpy.run_path(str(ROOT / "csrc" / "build.py"))
CPU, CUDA = "slap_ds.ops._slap_fps", "slap_ds.ops._slap_fps_cuda"


class BuildNative(build_ext):
    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        # Before anything can fail: neither pip's kept build/ nor an editable install may go on with
        # an old library.
        target.unlink(missing_ok=True)
        if self.inplace or getattr(self, "editable_mode", False):
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        try:
            if ext.name == CPU:
                build["build_cpu"](target)
            elif nvcc := build["find_nvcc"]():
                build["build_cuda"](nvcc, target)
        except build["BuildError"] as error:
            target.unlink(missing_ok=True)
            if os.environ.get("SLAP_BUILD") == "require":
                raise SystemExit(f"slap_ds: {ext.name} was not built.\n{error}") from error
            print(
                f"WARNING: slap_ds: {ext.name} was not built; farthest points will be selected "
                f"in PyTorch, many times slower (SLAP_BUILD=require makes this an error).\n{error}",
                file=sys.stderr,
            )


class AnyPython(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(name, sources=[], optional=True) for name in (CPU, CUDA)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
