"""What a start says, and that ordinary faults of a machine are one line each."""

import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from slap_ds.cli import main
from slap_ds.data import writer
from slap_ds.distributed import startup
from slap_ds.errors import counted, mistake
from slap_ds.report.numbers import size_text
from tests.cli.test_cli import fails
from tests.recipes import tiny_config, tiny_model

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def path(model, tmp_path):
    config = tiny_config(model, tmp_path / "run", steps=2, engine={"kind": "torch"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(tmp_path / "run.yaml")


def test_a_start_says_its_phases_what_it_trains_and_where_it_is(path, tmp_path, model, capsys):
    main(["train", path])
    run = tmp_path / "run"
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("slap-ds: ")]
    assert told[:3] == [
        f"slap-ds: starting {run}",
        "slap-ds: reading the data",
        f"slap-ds: loading {model}",
    ]
    assert re.fullmatch(
        r"slap-ds: llama, \d+ k parameters; [\d,]+ samples, [\d,]+ to evaluate; slap, keep 0.6, of "
        r"16 candidates a step; 2 steps; 1 rank on cpu",
        told[3],
    )
    assert told[4:] == [
        f"slap-ds: done, 2 steps in {run}; next: slap-ds report {run}, slap-ds eval {run}, "
        f"slap-ds export {run}"
    ]
    main(["train", path, "--steps", "3"])
    assert "continues after 2 of 3 steps" in capsys.readouterr().err


OURS = r"slap-ds: |evaluation loss \d|step \d+/\d+: loss "


@pytest.mark.parametrize(
    ("given", "code", "last"),
    [
        ([], 0, r"slap-ds: done, 2 steps in "),
        (["--data.train", "[nowhere.jsonl]"], 1, r"slap-ds: error: nowhere\.jsonl: no such file"),
    ],
)
def test_a_terminal_shows_our_lines_alone(path, given, code, last):
    """Nothing of the libraries: no banner, warning or bar, of a run or of a start that fails."""
    done = subprocess.run(
        [sys.executable, "-m", "slap_ds", "train", path, *given],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == code
    lines = done.stdout.splitlines()
    assert [line for line in lines if not re.match(OURS, line)] == []
    assert re.match(last, lines[-1])


def test_the_first_line_comes_before_what_takes_long_to_import(path):
    code = (
        "import sys, slap_ds.cli.training as t\n"
        "def tell(text): raise SystemExit('torch' in sys.modules)\n"
        "t.tell = tell\n"
        f"from slap_ds.cli import main\nmain(['train', {path!r}])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, timeout=120).returncode == 0
    )


def test_one_process_on_a_machine_of_eight_gpus(path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    main(["train", path])
    told = capsys.readouterr().err
    assert "this machine has 8 GPUs and one process uses one of them" in told
    assert f"deepspeed --num_gpus 8 --module slap_ds train {path}" in told


def test_a_second_process_in_the_same_run_folder(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(startup, "_FREED_WITHIN_S", 0.3)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("a+") as lock:
        lock.write("process 7 on gpu1")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = fails(capsys, "train", path)
        assert f"run_dir {str(tmp_path / 'run')!r} is in use by process 7 on gpu1" in told
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
    main(["train", path])
    assert f"process {os.getpid()} on " in (tmp_path / "run" / ".lock").read_text()


def test_a_full_cache_disk(path, tmp_path, capsys, monkeypatch):
    """In the child that reads the data; such an error does not name its file."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.StoreWriter, "add", full)
    told = fails(capsys, "train", path, "--data.cache_dir", str(tmp_path / "cache"))
    assert told.startswith(f"slap-ds: error: {tmp_path / 'cache'}: No space left on device: free")
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_places_that_take_nothing(number, path, tmp_path, capsys, monkeypatch):
    def refused(where):
        raise OSError(number, os.strerror(number), str(where))

    monkeypatch.setattr(startup, "_locked", refused)
    told = fails(capsys, "train", path)
    assert f"{tmp_path / 'run' / '.lock'}: {os.strerror(number)}: " in told
    assert "choose another place" in told
    assert mistake(OSError(errno.EIO, "x", "y")) is None


def test_a_terminal_that_is_not_utf_8():
    """The locale decides how Python decodes arguments and files; the mode is changed for both."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "LC_ALL": "C"}
    environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment.pop("PYTHONIOENCODING", None)
    command = [sys.executable, "-m", "slap_ds", "compare", "für/世"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 1
    assert b"slap-ds: error: 'f\\xfcr/\\u4e16' is no run" in done.stderr


def test_counts_and_sizes_are_as_people_write_them():
    sizes = (999, 1000, 479_904, 8_030_000_000, 70_600_000_000)
    assert [size_text(n) for n in sizes] == ["999", "1.00 k", "480 k", "8.03 B", "70.6 B"]
    assert [counted(n, "rank") for n in (1, 2, 1000)] == ["1 rank", "2 ranks", "1,000 ranks"]
