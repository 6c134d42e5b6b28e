"""What takes long to import is imported by those who need it alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
# Seconds together; help, a mistyped command and a Python prompt need none of them.
HEAVY = {"torch", "transformers", "deepspeed", "numpy", "scipy", "pandas", "datasets", "peft"}
HEAVY |= {"trl", "accelerate", "matplotlib", "pyarrow", "pydantic", "rich", "tokenizers"}
# Of optional packages: training on files of JSON lines needs none of them.
OPTIONAL = {"datasets", "pyarrow", "pandas", "peft", "trl", "matplotlib", "wandb", "mlflow"}
END = "; import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


def imported(code):
    """The packages that a fresh Python has imported after `code`."""
    done = subprocess.run(
        [sys.executable, "-c", code + END],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import slap_ds",
        "import slap_ds.cli\ntry: slap_ds.cli.main(['--help'])\nexcept SystemExit: pass\n0",
    ],
    ids=["package", "help"],
)
def test_the_package_and_the_help_load_nothing_heavy(code):
    found = imported(code)
    assert "slap_ds" in found
    assert found & HEAVY == set()


def test_a_run_loads_no_optional_package():
    found = imported("import slap_ds.cli.training, slap_ds.train.loop, slap_ds.train.run")
    assert {"torch", "transformers"} <= found
    assert found & OPTIONAL == set()
