"""tests/gpu/check.py where there is no GPU: every part runs, faults are told, tables are made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import check, report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts, tiny, on the CPU."""
    out = tmp_path_factory.mktemp("check")
    command = [sys.executable, "tests/gpu/check.py", "--out", str(out), "--device", "cpu", "--tiny"]
    command += ["--limit-factor", "5"]  # limits are for GPUs; other work may keep this CPU busy
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    for part in check.LIMITS:
        assert f"GPU-CHECK {part} PASS" in done.stdout
    return out


def test_every_part_runs_and_says_what_it_found(results: Path) -> None:
    found = report.read(results)
    assert set(found) == set(check.LIMITS)
    assert found["smoke"]["facts"]["forward"] == "reuse"
    assert found["kernel"]["facts"]["passed"] >= 20
    assert found["sanitizer"]["facts"]["alone"] == "ok"
    assert 0 < found["attention"]["facts"]["gqa"] < 1e-2
    assert found["parity"]["facts"]["plain_float32"] == 0  # bit for bit on a CPU
    steps = {case["case"]: case for case in found["step"]["facts"]["result"]["cases"]}
    assert steps["reuse 0.4"]["flops"] < steps["separate 0.4"]["flops"] < steps["full"]["flops"]
    assert steps["reuse-host 0.4"]["boundary_bytes"] == steps["reuse 0.4"]["boundary_bytes"] > 0
    assert found["peers"]["facts"]["slap-40"] > 0
    assert found["peers"]["facts"]["bare"] == 1
    assert found["smollm2"]["facts"]["slap_after"] < found["smollm2"]["facts"]["slap_before"]


def test_the_tables_go_where_they_are_marked(results: Path) -> None:
    text = "before\n<!-- gpu:op -->\nold\n<!-- /gpu:op -->\nafter\n"
    text += "<!-- gpu:step -->\n<!-- /gpu:step -->"
    filled = report.put(text, report.read(results))
    assert "old" not in filled
    assert filled.startswith("before\n<!-- gpu:op -->\ndevice cpu; torch ")
    assert "| 600×64 | 1 |" in filled
    assert "\n| reuse 0.4 | " in filled
    assert "\n| reuse-host 0.4 | " in filled
    assert report.put(filled, report.read(results)) == filled


def run(tmp_path: Path, script: str, limit_s: float = 60.0) -> dict[str, Any]:
    command = [sys.executable, "-c", script]
    return check.run_part("part", command, limit_s, {}, tmp_path)


def test_a_part_that_dies_hangs_or_fails_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    assert run(tmp_path, "import os; os.abort()")["facts"]["error"] == "nothing was reported"
    slow = run(tmp_path, "import time; time.sleep(60)", limit_s=1.0)
    assert (slow["status"], slow["facts"]["error"]) == ("FAIL", "stopped after 1 s")
    file = tmp_path / "part.json"
    told = f"import json; json.dump({{'status': 'FAIL', 'error': 'x'}}, open({str(file)!r}, 'w'))"
    assert run(tmp_path, told)["facts"]["error"] == "x"
    passed = told.replace("FAIL", "PASS")
    assert run(tmp_path, passed)["status"] == "PASS"
    died = run(tmp_path, f"{passed}; import os; os._exit(3)")
    assert died["status"] == "FAIL"
    assert json.loads(file.read_text())["status"] == "FAIL"


def test_an_unknown_part_is_refused() -> None:
    command = [sys.executable, "tests/gpu/check.py", "--out", "/tmp", "--parts", "smoke,kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no parts ['kernels']; there are smoke, rates" in done.stderr
