"""The same targets under atheris, which follows coverage:

python -m tests.fuzz.coverage_guided rows -runs=100000 -timeout=5 [corpus folder]
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["slap_ds", "json"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(
            f"usage: coverage_guided TARGET [libFuzzer options]; targets: {', '.join(TARGETS)}"
        )
    target, _ = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
