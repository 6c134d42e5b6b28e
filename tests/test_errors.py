"""A wrong path is one line and exit code 1 in every command, not a traceback."""

import pytest

from slap_ds.cli import main
from slap_ds.errors import mistake


@pytest.fixture
def in_the_way(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    return path


@pytest.mark.parametrize(
    "command",
    [
        ["train", "configs/demo.yaml", "--engine.kind", "torch", "--run_dir", "{file}/run"],
        ["train", "configs/demo.yaml", "--engine.kind", "torch", "--run_dir", "{file}"],
        ["train", "configs/demo.yaml", "--dry-run", "--data.cache_dir", "{file}"],
        ["preview", "configs/demo.yaml", "--data.cache_dir", "{file}/cache"],
        ["launch", "--run-dir", "{folder}", "--", "{folder}/no-such-launcher", "x.py"],
    ],
)
def test_a_path_that_cannot_be(command, in_the_way, capfd):
    words = [w.format(file=in_the_way, folder=in_the_way.parent) for w in command]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    *phases, line = capfd.readouterr().err.strip().splitlines()
    assert all(told.startswith("slap-ds: ") and "error" not in told for told in phases)
    assert line.startswith("slap-ds: error: ")
    assert str(in_the_way.parent) in line
    assert "give a path that exists and can be used" in line


def test_faults_of_the_machine_are_no_mistakes():
    assert mistake(OSError(5, "Input/output error", "x")) is None
    assert mistake(RuntimeError("x")) is None
    assert mistake(ValueError("found 3, expected 4")) == "found 3, expected 4"
    assert mistake(FileNotFoundError("no model folder at 'x'")) == "no model folder at 'x'"
