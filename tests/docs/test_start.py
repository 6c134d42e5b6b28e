"""The page that a newcomer follows first does what it says, command by command."""

import os
import subprocess
import sys
from pathlib import Path

from tests.docs.commands import ROOT
from tests.docs.test_pages import blocks


def test_ten_minutes_with_your_own_data(tmp_path):
    """All blocks marked `run`, in order, in one folder that looks like a clone."""
    (tmp_path / "slap_ds").symlink_to(ROOT / "slap_ds")
    marked = [text for mark, text in blocks(ROOT / "docs" / "start.md", "sh") if mark == "run"]
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", "\n".join(marked)],
        cwd=tmp_path,
        env={**os.environ, "PATH": tools, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 samples" in done.stderr  # one of the eight rows has no answer
    assert "assistant:" in done.stdout
    run = tmp_path / "runs" / "my"
    assert "empty" in (run / "rejects.jsonl").read_text("utf-8")
    assert (run / "report" / "index.html").exists()
    assert (run / "model" / "model.safetensors").exists()
