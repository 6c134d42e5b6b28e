"""Ranges, lock and lanes: what is tested, what is installed and what is written down agree."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import lanes

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
TOY = """
[project]
name = "slap_ds"
dependencies = ["torch>=2.11,<2.14", "Py_YAML>=6.0.2,<7"]
[project.optional-dependencies]
lora = ["peft>=0.21,<0.22"]
trl = ["trl>=1.16,<1.17"]
harness = ["lm_eval>=1,<2"]
test = ["pytest>=8,<10", "ruff>=1,<2", "slap_ds[lora,trl]"]
"""


def locked(*files):
    """(requirement, hashes) of every entry of the files in requirements/."""
    for file in files:
        text = (lanes.ROOT / "requirements" / file).read_text().replace("\\\n", " ")
        for line in text.splitlines():
            if line.strip() and not line.startswith("#"):
                entry, *hashes = line.split("--hash=")
                yield Requirement(entry), hashes


def ranges(python=None):
    """Name -> range, of what training and the tests need, on any Python or on this one."""
    place = {"python_version": python, "extra": ""}
    found = {}
    project = lanes.tomllib.loads((lanes.ROOT / "pyproject.toml").read_text())["project"]
    for group in [project["dependencies"], *project["optional-dependencies"].values()]:
        for one in map(Requirement, group):
            here = one.marker is None or python is None or one.marker.evaluate(place)
            if here and not one.extras:
                found[canonicalize_name(one.name)] = one.specifier
    return found


def test_a_lane_is_the_lowest_or_the_newest():
    floor = ["torch==2.11", "py-yaml==6.0.2", "pytest==8", "peft==0.21"]
    assert lanes.requirements(TOY, "floor") == floor
    newest = [one.replace("==", ">=") for one in floor]
    assert lanes.requirements(TOY, "newest") == [*newest, "trl>=1.16"]
    other = lanes.requirements(TOY, "floor", ["torch==2.12.0"])
    assert other == ["torch==2.12.0", *floor[1:]]
    with pytest.raises(ValueError, match=r"'peft<0\.22' has no lower bound"):
        lanes.requirements(TOY.replace(">=0.21,", ""), "floor")


def test_what_pytest_counted_comes_into_the_table():
    junit = '<testsuites><testsuite tests="9" failures="1" errors="2" skipped="3"/></testsuites>'
    found = lanes.counts(junit)
    assert found == {"passed": 3, "failed": 3, "skipped": 3}
    versions = {name: f"{n}.0" for n, name in enumerate([*lanes.COLUMNS, "pytest", "not-wanted"])}
    wanted = [f"{name}>=1" for name in [*lanes.COLUMNS, "pytest"]]
    line = lanes.row("floor", {**found, "seconds": 61.4, "versions": versions}, wanted, "abc1234+")
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", cells[0])
    assert cells[1:5] == ["floor", "3 / 3 / 3", "61", "abc1234+"]
    assert cells[6:] == ["0.0", "1.0", "2.0", "3.0", "4.0", "pytest 5.0"]


def test_the_newest_row_stands_first():
    page = (
        "# Title\n| a |\n| --- |\n| b |\n\n| date | lane |\n| --- | --- |\n| old | row |\nafter\n"
    )
    assert lanes.with_row(page, "| new |") == page.replace("| old", "| new |\n| old")
    with pytest.raises(ValueError, match="no table"):
        lanes.with_row("# Title\n| a |\n| --- |\n", "| new |")
    head = lanes.HEAD.search(lanes.TABLE.read_text())[0].splitlines()[0]
    assert head.count("|") == 1 + 6 + len(lanes.COLUMNS) + 1


def test_every_range_has_two_ends():
    for name, range_ in ranges().items():
        assert sorted(part.operator for part in range_) == ["<", ">="], name


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_what_is_needed_within_the_ranges(python):
    place = {"python_version": python, "python_full_version": f"{python}.1"}
    pinned = {}
    for one, hashes in locked("build.txt", "run.txt", "test.txt", "docs.txt"):
        assert hashes, one
        if one.marker is None or one.marker.evaluate(place):
            (exact,) = one.specifier
            assert exact.operator == "=="
            assert pinned.setdefault(one.name, exact.version) == exact.version
    ((torch, _),) = locked("torch.txt")
    pinned["torch"] = next(iter(torch.specifier)).version
    assert {"pip", "setuptools", "ninja"} <= set(pinned)
    # Of extras that no test needs.
    optional = {"liger-kernel", "lm-eval", "mpi4py"}
    optional |= {"mlflow-skinny", "tensorboard", "trackio", "wandb"}
    for name, range_ in ranges(python).items():
        if name not in optional:
            assert range_.contains(pinned[name]), f"{name} {pinned[name]}: make lock"


def test_no_host_and_no_path_in_what_is_committed():
    for file in (lanes.ROOT / "requirements").glob("*.txt"):
        text = file.read_text()
        assert not re.search(r"://|file:|^ *(-i|-f|--index|--extra|--find)", text, re.M), file
