"""benchmarks/bench_peers.py in its quick form: contestants agree on a loss, or make no table."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(tmp_path, *arguments):
    out = tmp_path / "peers.json"
    command = [sys.executable, "benchmarks/bench_peers.py", "--tiny", "--json", str(out)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(out.read_text()), done.stdout


def check(result, names):
    assert list(result["losses"]) == names
    assert max(result["losses"].values()) - min(result["losses"].values()) <= 1e-4
    assert 6 < result["losses"]["bare"] < 9  # fresh weights over 2,048 tokens: log 2048 is 7.6
    rows = {row["name"]: row for row in result["throughput"]}
    assert list(rows) == names
    assert rows["bare"]["cpu_s_of_bare"] == [1, 1, 1]
    for row in [*rows.values(), *result["start"]]:
        least, largest = row["wall_s_of_bare"][1:]
        assert 0 < least <= row["wall_s_of_bare"][0] <= largest
    for row in rows.values():
        assert (row["trained_token_share"] < 1) == row["name"].startswith("slap-")


def test_a_loop_and_the_default_selection_and_the_place_of_the_tables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- peers: 1 -->\nold\n<!-- /peers -->\nafter\n")
    result, told = run(tmp_path, "--peers", "slap-40", "--into", str(page))
    check(result, ["bare", "slap-40"])
    filled = page.read_text()
    assert "old" not in filled
    assert filled.startswith("before\n<!-- peers: 1 -->\ncpu (")
    assert filled.endswith("<!-- /peers -->\nafter\n")
    assert "\n| slap_ds, default, 40 % pruned | " in filled
    assert "\n| slap_ds, default, 40 % pruned | " in told
    assert result["tokenising"]["slap_ds, a store with masks"]["rows"] == 659


@pytest.mark.slow
def test_trainer_and_trl_have_the_loss_of_the_loop(tmp_path):
    names = ["bare", "trainer", "trl-packed", "trl-free"]
    result, told = run(tmp_path, "--peers", *names)
    if importlib.util.find_spec("trl") is None:
        assert "trl not installed: TRL's rows are left out" in told
        names = names[:2]
    check(result, names)


@pytest.mark.slow
def test_under_zero_3_on_two_ranks(tmp_path):
    names = ["bare", "trainer", "slap-40"]
    check(run(tmp_path, "--ranks", "2", "--peers", *names)[0], names)


def test_other_losses_make_no_table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_peers

    one, other = {"loss": 7.0, "predicted": 10}, {"loss": 7.001, "predicted": 10}
    bench_peers.check_losses({"bare": [one], "slap-full": [one]}, 1e-4)
    with pytest.raises(SystemExit, match=r"losses on one batch differ by over 0\.0001"):
        bench_peers.check_losses({"bare": [one], "slap-full": [other]}, 1e-4)
    with pytest.raises(SystemExit, match="predicted tokens of one batch differ"):
        bench_peers.check_losses({"bare": [one], "slap-full": [{**one, "predicted": 9}]}, 1e-4)
