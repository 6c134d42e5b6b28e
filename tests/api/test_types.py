"""The types of the public interface, as a user's mypy sees them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("user_script.py")
WRONG = """\
import slap_ds
slap_ds.select([1.0], keep="half")
picks: list[int] = slap_ds.select([1.0]).picks
slap_ds.train(3)
slap_ds.chooose
"""


# What the interface shows nothing of is left out: to follow it takes mypy longer than all the rest.
SETTINGS = """\
[mypy]
strict = true
follow_imports = silent
[mypy-datasets.*,deepspeed.*,peft.*,pyarrow.*,scipy.*,tokenizers.*,transformers.*]
ignore_missing_imports = true
follow_imports = skip
"""


def test_a_strict_script_passes_and_a_wrong_one_does_not(tmp_path):
    """By mypy with no settings of this project, which says nothing about the package itself."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", str(SCRIPT), str(wrong)]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / "user_script")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    errors = [line.split(":")[:2] for line in done.stdout.splitlines() if ": error:" in line]
    assert [int(line) for _, line in errors] == [2, 3, 4, 5], done.stdout + done.stderr
    assert {Path(file).name for file, _ in errors} == {"wrong.py"}
