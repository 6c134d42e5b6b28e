"""The scoring benchmark in its quick form: it runs, and writes what its schema says."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quick_form_writes_its_schema(tmp_path):
    out = tmp_path / "scoring.json"
    arguments = ["--shape", "tiny", "--tokens", "64", "--row-tokens", "64", "--sample-tokens", "32"]
    arguments += ["--layers", "1", "--rounds", "1", "--train", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_scoring.py", *arguments, "--json", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    cases = {case["case"]: case for case in result["cases"]}
    assert result["default_over_loss_forward"] == cases["default"]["over_loss_forward"] > 0
    assert result["shape"]["V"] == 32003
    assert result["shape"]["response_tokens"] <= 64
    assert {"cpu", "torch", "transformers", "commit"} <= set(result["environment"])
    assert "--shape tiny" in result["command"]
    assert cases["loss"]["flops_over_loss_forward"] == 1
    for name in ("head_kron 16x16", "hvp 4", "training step"):
        assert cases[name]["wall_s"] > 0
        assert name in done.stdout
    assert 1 < cases["default"]["flops_over_loss_forward"] < 2
    # Of a plain head this small, blocks and model included, only the head's own peak is bounded.
    assert cases["loss"]["peak_bytes"] <= cases["loss"]["head_bytes_bound"]
