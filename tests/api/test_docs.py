"""docs/api.md does what it says, and its names are all there are."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import slap_ds
from slap_ds import selection

DOCS = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_examples_of_the_page_are_true(monkeypatch):
    monkeypatch.setattr(selection, "_registered", {})
    found = doctest.testfile(str(DOCS), module_relative=False, optionflags=doctest.FAIL_FAST)
    assert found.attempted > 25
    assert not found.failed


@pytest.mark.parametrize("name", ["select", "score", "register_selector", "farthest_point"])
def test_the_examples_of_docstrings_are_true(name):
    function = getattr(slap_ds, name)
    inside = vars(sys.modules[function.__module__])
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in doctest.DocTestFinder(recurse=False).find(function, name, globs=inside):
        runner.run(example)
    assert runner.tries
    assert not runner.failures


def test_the_page_names_every_public_name():
    text = DOCS.read_text()
    for name in slap_ds.__all__:
        assert getattr(slap_ds, name) is not None
        assert name == "__version__" or f"`{name}" in text, name


def test_importing_the_package_loads_nothing():
    code = "import slap_ds, sys; m = sys.modules; print([*filter(is_ours, m)], 'torch' in m)"
    code = f"is_ours = lambda name: name.startswith('slap_ds.')\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def test_train_is_a_folder_that_can_be_called():
    """Whatever was imported before: `slap_ds.train` and `slap_ds.train.loop` both work."""
    code = (
        "import slap_ds; import slap_ds.train.loop as loop; from slap_ds import train;"
        "assert callable(slap_ds.train) and slap_ds.train is train and train.loop is loop"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
