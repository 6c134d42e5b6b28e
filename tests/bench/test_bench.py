"""`slap-ds bench`: its numbers, computed again from metrics.jsonl and by an outside clock."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slap_ds import cli
from slap_ds.bench import nodes
from slap_ds.bench.random_data import RandomStore, random_inputs
from slap_ds.bench.throughput import Data, throughput
from slap_ds.config.file import write_config
from slap_ds.engine.peak import measured_peak, peak_of
from slap_ds.jsonl import read_lines
from slap_ds.launch.environment import free_port
from tests.ranks import run_ranks
from tests.recipes import tiny_config, tiny_model

STEPS, WARMUP = 3, 1
PEAK = 1e12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def config(model, folder, **sections):
    sections = {"model": {"gradient_checkpointing": True}, **sections}
    return tiny_config(model, folder / "run", data={"eval": []}, **sections)


class LineClock(threading.Thread):
    """When each line of a file appeared, by the clock of a process that has nothing else to do."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.path, self.times, self.over = path, [], threading.Event()

    def run(self):
        while not self.over.wait(0.002):
            lines = self.path.read_bytes().count(b"\n") if self.path.exists() else 0
            self.times += [time.perf_counter()] * (lines - len(self.times))


def measure_work(settings, data, values):
    return throughput(settings, STEPS, WARMUP, data, "keep" if values else None, values, PEAK)[1]


def measured(settings, world, data, values=()):
    """Rank 0's points; the records of each, and the seconds it took by the clock outside."""
    path = Path(f"{settings.run_dir}-bench", "metrics.jsonl")
    clock = LineClock(path)
    clock.start()
    results = run_ranks(measure_work, world, settings, data, values)
    clock.over.set()
    clock.join()
    points = results[0]
    for other in results:
        for mine, theirs in zip(points, other, strict=True):
            assert mine["candidate_tokens_per_s"] == theirs["candidate_tokens_per_s"]
            assert mine["mfu"] == theirs["mfu"]
    lines = read_lines(path)
    at = {line["step"]: i for i, line in enumerate(lines)}
    out = []
    for point in points:
        first, last = point["steps"]
        records = [line for line in lines if first <= line["step"] <= last]
        assert len(records) == STEPS
        # From the end of the last step before them.
        out.append((point, records, clock.times[at[last]] - clock.times[at[first - 1]]))
    return out


def check(point, records, outside_s):
    """A point against sums over its lines of metrics.jsonl, and against the clock outside."""
    step_s = sum(line["step_s"] for line in records)
    assert point["wall_s"] == pytest.approx(outside_s, rel=0.05)
    assert point["wall_s"] == pytest.approx(step_s, rel=0.05)
    for key, rate in {
        "candidate_tokens": "candidate_tokens_per_s",
        "trained_tokens": "trained_tokens_per_s",
        "candidates": "candidates_per_s",
        "picked": "trained_samples_per_s",
        "flops": "flops_per_s",
    }.items():
        whole = sum(line[key] for line in records)
        assert point[rate] == pytest.approx(whole / step_s, rel=0.05), key
        assert point[rate] == pytest.approx(whole / outside_s, rel=0.05), key
    selection = sum(line["selection_s"] for line in records)
    assert point["selection_share"] == pytest.approx(selection / step_s, rel=0.05)
    for phase, seconds in point["phase_s"].items():
        told = sum(line.get(f"{phase}_s", 0.0) for line in records)
        assert seconds * STEPS == pytest.approx(told)
    sent = sum(line["bytes_sent"] for line in records) / STEPS
    # The two barriers of the benchmark and the exchanges that end a step are not in bytes_sent.
    ours = sum(each["bytes"] for each in point["collectives"].values())
    assert sent <= ours <= sent + 200


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_rates_agree_with_the_metrics_of_the_run(world, model, tmp_path):
    # Enough work for a step that what happens around it is small beside it.
    settings = config(model, tmp_path, batch={"candidates": 96})
    data = Data(mean_tokens=128, spread=0.4, response_share=0.3)
    ((point, records, outside_s),) = measured(settings, world, data)
    check(point, records, outside_s)
    assert point["ranks"] == world
    assert point["forward"] == "reuse"
    theirs = point["deepspeed_collectives"]
    assert (sum(each["bytes"] for each in theirs.values()) > 0) == (world > 1 or bool(theirs))
    if world == 2:
        # Every candidate's score crosses once: loss, position, tokens and a sketch of 32 floats.
        assert point["collectives"]["gather"]["bytes"] * 2 >= 96 * (20 + 4 * 32)
        assert point["collectives"]["gather"]["calls"] == 1


def test_a_sweep_and_its_utilisation_by_hand(model, tmp_path):
    """Equal samples, so that keep is the share of everything that training costs."""
    settings = config(model, tmp_path, engine={"kind": "torch"}, batch={"candidates": 64})
    data = Data(mean_tokens=64, response_share=0.5)
    found = measured(settings, 1, data, (1.0, 0.5))
    points = [point for point, _, _ in found]
    assert [point["value"] for point in points] == [1.0, 0.5]
    for point, lines, outside_s in found:
        check(point, lines, outside_s)
        share = point["trained_tokens_per_s"] / point["candidate_tokens_per_s"]
        assert share == pytest.approx(point["value"])
    width, layers, vocab, length, n = 32, 2, 2048, 64, 64
    block = 4 * width * width + 3 * width * 64 + 2 * width  # attention, MLP, two norms
    forward = 2 * (layers * block + width) * length + 2 * layers * width * length**2
    head = 2 * vocab * width * 32
    for point, trained in zip(points, (n, n // 2), strict=True):
        needed = trained * 3 * (forward + head) * STEPS / point["wall_s"]
        assert point["mfu"] == pytest.approx(needed / PEAK, rel=1e-6)
    # Nothing pruned: checkpointing runs each block forward twice, backward counts two.
    run = n * (4 * forward + 3 * head) * STEPS / points[0]["wall_s"]
    assert points[0]["hfu"] == pytest.approx(run / PEAK, rel=1e-6)


def test_random_samples_follow_their_distribution(model, tmp_path):
    store = RandomStore(4000, 50, 200, 0.5, 0.25, 4096, 7)
    assert store.lengths.mean() == pytest.approx(200, rel=0.03)
    assert store.trained_tokens.sum() / store.lengths.sum() == pytest.approx(0.25, rel=0.02)
    again = RandomStore(4000, 50, 200, 0.5, 0.25, 4096, 7)
    for i in (0, 17, 3999):
        sample = store[i]
        assert sample.ids.tolist() == again[i].ids.tolist()
        assert len(sample.ids) == store.lengths[i]
        assert sample.mask.sum() == store.trained_tokens[i]
        assert 0 <= sample.ids.min() <= sample.ids.max() < 50
    assert set(RandomStore(9, 50, 30, 0.0, 0.5, 64, 0).lengths) == {30}
    with pytest.raises(ValueError, match=r"expected 2 to data.max_tokens, 256"):
        random_inputs(config(model, tmp_path), 257, 0, 0.5)


def test_peaks_by_name():
    assert peak_of("NVIDIA H100 80GB HBM3", "bfloat16")[0] == 989e12
    assert peak_of("NVIDIA H100 PCIe", "bfloat16")[0] == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "float32")[0] == 19.5e12
    assert peak_of("NVIDIA A10", "bfloat16")[0] == 125e12
    assert peak_of("NVIDIA L40S", "bfloat16")[0] == 362e12
    assert peak_of("NVIDIA GH200 480GB", "bfloat16")[0] == 989e12
    for name in ("Tesla V100-SXM2-32GB", "Some A1000"):
        peak, why = peak_of(name, "bfloat16")
        assert peak is None
        assert "--peak-flops" in why
    assert 1e8 < measured_peak("float32") < 1e14


def test_the_command_writes_json_table_and_plot(model, tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    write_config(config(model, tmp_path), path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-m", "slap_ds", "bench", "throughput", str(path)]
    command += ["--steps", "2", "--warmup", "1", "--data", "config", "--engine.kind", "torch"]
    command += ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    (point,) = result["points"]
    told = [line.split(":")[1] for line in done.stderr.splitlines() if "slap-ds: step" in line]
    assert told == [" step 1/3", " step 2/3", " step 3/3"]
    assert result["environment"]["torch"]
    assert f"{point['candidate_tokens_per_s']:,.0f}" in done.stdout
    assert "matrix products of this run" in done.stdout
    assert 0 < point["mfu"] < point["hfu"] < 1.5
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


LAUNCHER = """#!{python}
import json, pathlib, sys
n, arguments = sys.argv[1], sys.argv[2:]
if n == "3":
    sys.exit(7)
out = pathlib.Path(arguments[arguments.index("--json") + 1])
point = {{"ranks": int(n), "arguments": arguments, "sweep": None, "value": None}}
out.write_text(json.dumps({{"points": [point]}}))
"""


def test_a_sweep_over_nodes_starts_the_launcher_for_each(tmp_path):
    launcher = tmp_path / "launcher"
    launcher.write_text(LAUNCHER.format(python=sys.executable))
    launcher.chmod(0o755)
    points = nodes.sweep_nodes([1, 2], f"{launcher} {{n}}", None, ["bench", "a b"])
    assert [(p["sweep"], p["value"], p["ranks"]) for p in points] == [
        ("nodes", 1, 1),
        ("nodes", 2, 2),
    ]
    assert points[1]["arguments"][:2] == ["bench", "a b"]
    with pytest.raises(ValueError, match="3 nodes: the launch ended with 7"):
        nodes.sweep_nodes([3], f"{launcher} {{n}}", None, [])
    with pytest.raises(ValueError, match=r"expected \{n\}"):
        nodes.sweep_nodes([1], "deepspeed", None, [])
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    with pytest.raises(ValueError, match=r"asks for 4 nodes, .*hosts has 2"):
        nodes.sweep_nodes([1, 4], None, str(tmp_path / "hosts"), [])
    assert nodes.default_launcher("h s").endswith(
        "--hostfile 'h s' --num_nodes {n} --module slap_ds"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sweep", "keep"], "go together"),
        (["--hostfile", "hosts"], "are for --sweep nodes"),
        (["--sweep", "nodes", "--values", "1.5"], "expected whole numbers"),
        (
            ["--sweep", "keep", "--values", "1", "1.5"],
            "--values 1.5: 1 mistake\n  selection.keep: Input should be less than or equal to 1 "
            "(found 1.5)\n",
        ),
        (["--steps", "0"], "expected at least 1 of each"),
    ],
)
def test_mistakes_are_one_line(arguments, words, model, tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "run.yaml"
    write_config(config(model, tmp_path, engine={"kind": "torch"}), path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "throughput", str(path), *arguments])
    assert stop.value.code == 1
    text = capsys.readouterr().err
    assert words in text
    assert "pydantic" not in text


def test_samples_are_no_longer_than_they_may_be_by_default(model, tmp_path):
    settings = config(model, tmp_path, engine={"kind": "torch"}, batch={"candidates": 4})
    assert settings.data.max_tokens == 256
    ((point, lines, _),) = measured(settings, 1, Data())
    assert [line["candidate_tokens"] for line in lines] == [4 * 256] * STEPS
    assert point["ranks"] == 1


def test_one_rank_has_no_network_to_measure(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    cli.main(["bench", "network", "--mib", "1"])
    text = capsys.readouterr().out
    assert "a single rank has no peer" in text
    assert "GB/s" not in text


def test_network_between_two_ranks(tmp_path):
    port, out = str(free_port()), tmp_path / "network.json"
    command = [sys.executable, "-m", "slap_ds", "bench", "network", "--mib", "4"]
    jobs = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        environ = {**os.environ, "MASTER_ADDR": "127.0.0.1"}
        environ |= {name: str(value) for name, value in place.items()}
        more = ["--json", str(out)] if rank == 0 else []
        jobs.append(subprocess.Popen([*command, *more], env=environ, cwd=Path(__file__).parents[2]))
    assert [job.wait(200) for job in jobs] == [0, 0]
    result = json.loads(out.read_text())
    assert (result["ranks"], result["hosts"], result["message_bytes"]) == (2, 1, 4 * 2**20)
    assert 0 < result["latency_s"] < result["all_reduce_s"]
    expected = result["message_bytes"] / result["all_reduce_s"]  # 2 (n - 1) / n is 1 for two
    assert result["bus_bytes_per_s"] == pytest.approx(expected)
