"""DESIGN: modules import only what stands left of them; one room for deepspeed and collectives."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "slap_ds"
ORDER = ["ops", "selection", "scoring", "data", "models", "comm", "engine", "trainer", "cli"]
# Modules that are no room of their own: where they stand in the order.
BETWEEN = {
    "config_file": 0.1,
    "deepspeed_json": 0.5,
    "metrics": 0.5,
    "progress": 0.5,
    "tensor_files": 0.5,
    "whole_state": 0.6,
    "watchdog": 4.5,
    "pass_on": 4.6,
    "checkpoint": 6.5,
    "resume": 6.6,
    "start": 6.6,
    "run": 6.7,
    "evaluation": 6.8,
    "step": 6.9,
    "curate": 7.5,
    "export": 6.5,
    "report": 7.6,
    "study": 7.5,
    "estimate": 6.5,
    "doctor": 6.5,
    "bench": 7.5,
    "supervise": 6.5,
    "faults": 7.5,
}
LEAVES = {
    "__init__",
    "builds",
    "config",
    "interfaces",
    "launch_env",
    "mistakes",
    "peers",
    "strict_json",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def place(name):
    return BETWEEN.get(name, ORDER.index(name) if name in ORDER else None)


def test_modules_import_only_to_their_left():
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if name == "__main__":
            continue
        for module in imports(path):
            if not module.startswith("slap_ds"):
                continue
            target = room(module)
            if target in LEAVES or (
                not (PACKAGE / target).exists() and not (PACKAGE / f"{target}.py").exists()
            ):
                continue
            assert name not in LEAVES, f"{path.name} is a leaf and imports {module}"
            assert place(name) is not None, f"give {name} a place in the order"
            assert target == name or place(target) <= place(name), f"{path} imports {module}"
            checked += 1
    assert checked > 30


def test_deepspeed_and_collectives_stay_in_their_rooms():
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in imports(path):
            if module.split(".")[0] == "deepspeed":
                assert name == "engine", f"{path} imports deepspeed"
            if module.startswith("torch.distributed"):
                assert name in ("comm", "engine"), f"{path} imports torch.distributed"
