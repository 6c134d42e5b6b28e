"""DESIGN: folders import what stands left of them; one package for deepspeed and collectives."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "slap_ds"
LEAVES = {"__init__", "compat", "config", "device", "errors", "files", "jsonl", "timing"}
ORDER = ["ops", "selection", "scoring", "data", "models", "distributed", "launch", "engine"]
ORDER += [
    "checkpoint",
    "answers",
    "train",
    "api",
    "hf_trainer",
    "evaluation",
    "bench",
    "study",
    "report",
    "cli",
]
# Files and folders beside that order: all they may import is what the named folder may, and it.
BESIDE = {"estimate": "engine", "doctor": "engine", "curate": "train"}
# Neither needs nor sees the other.
SIBLINGS = {("bench", "evaluation"), ("evaluation", "bench")}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder_of(module):
    """The file or folder of the package's root that a module belongs to."""
    parts = module.split(".")
    known = len(parts) > 1 and (
        (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists()
    )
    return parts[1] if known else "__init__"


def allowed(name):
    if name in LEAVES:
        return LEAVES
    if name in BESIDE:
        return {name} | allowed(BESIDE[name])
    left = ORDER[: ORDER.index(name) + 1]
    beside = {one for one, base in BESIDE.items() if ORDER.index(base) < ORDER.index(name)}
    return {one for one in left if (name, one) not in SIBLINGS} | LEAVES | beside


def test_folders_import_only_to_their_left():
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if (
            name == "__main__" or path == PACKAGE / "__init__.py"
        ):  # the door names all that is public
            continue
        for module in imports(path):
            if module.split(".")[0] == "slap_ds":
                assert folder_of(module) in allowed(name), f"{path} imports {module}"
                checked += 1
    assert checked > 300


def test_no_module_lies_loose_in_the_root():
    loose = {path.stem for path in PACKAGE.glob("*.py")}
    named = {"__init__", "__main__", "curate", *LEAVES}
    assert loose <= named
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == {*ORDER, "config", "doctor", "estimate"}


def test_deepspeed_and_collectives_stay_in_their_packages():
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in imports(path):
            if module.split(".")[0] == "deepspeed":
                assert name == "engine", f"{path} imports deepspeed"
            if module.startswith("torch.distributed"):
                packages = ("compat", "distributed", "engine")
                assert name in packages, f"{path} imports torch.distributed"


def test_no_file_is_long():
    """What takes more than 400 lines is two things."""
    lengths = {
        path.relative_to(PACKAGE.parent): len(path.read_text("utf-8").splitlines())
        for folder in ("slap_ds", "csrc", "tests", "benchmarks", "examples")
        for pattern in ("*.py", "*.cpp", "*.cu", "*.h", "*.sh")
        for path in (PACKAGE.parent / folder).rglob(pattern)
    }
    assert len(lengths) > 300
    assert {str(path): n for path, n in lengths.items() if n > 400} == {}
