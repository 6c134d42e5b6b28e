"""Where a benchmark ran: machine, versions, commit; part of every result file."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe(device: torch.device | None = None) -> dict[str, str]:
    """Names only: nothing that tells whose machine it was."""
    out = {"python": platform.python_version(), "cpu": _cpu(), "cores": str(_cores())}
    for package in ("torch", "deepspeed", "transformers"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "not installed"
    out["threads"] = str(torch.get_num_threads())
    out["device"] = (
        torch.cuda.get_device_name(device)
        if device is not None and device.type == "cuda"
        else "cpu"
    )
    changed = _git("status", "--porcelain")
    out["commit"] = _git("rev-parse", "HEAD") + ("+" if changed not in ("", "unknown") else "")
    return out


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return "unknown"
    result = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else "unknown"
