"""Commands of the documentation, held to what they name: our parsers, settings, files, targets.

    "slap-ds train my.yaml --selection.keep 0.8" -> the parser of `train`, then the schema

`check` raises AssertionError or ValueError for what is wrong, Unknown for what is not ours.
"""

import contextlib
import io
import itertools
import re
import shlex
import sys
from pathlib import Path

import yaml

from slap_ds.cli import VERBOSE, _parser
from slap_ds.cli.evidence import label_and_settings
from slap_ds.config.file import read_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]
LAUNCHERS = {"deepspeed", "torchrun", "srun", "mpirun", "python", "python3"}


class Unknown(Exception):
    """A command that is neither ours nor a launcher's."""


def commands(block):
    """The words of every command of a shell block."""
    line = ""
    for part in block.replace("\\\n", " ").splitlines():
        line += part
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        words.whitespace_split = True
        try:
            found = [*words, "&&"]
        except ValueError:  # a quoted text goes on in the next line
            continue
        line, command = "", []
        for word in found:
            if word in {"&&", "|", ";"}:
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def check(words, sample):
    """Hold a command to what it names; `sample` is the run file that stands for the user's own."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if not words or words[0] in {"export", "cd", "."}:
        return
    name, *rest = words
    name = name.removeprefix(".venv/bin/")
    if name == "slap-ds":
        _ours(rest, sample)
    elif name in LAUNCHERS and (at := _module_at(rest)):
        module, arguments = rest[at], rest[at + 1 :]
        if module == "slap_ds":
            _ours(arguments, sample)
        elif module != "venv":
            _script(ROOT / f"{module.replace('.', '/')}.py", arguments, sample)
    elif name in LAUNCHERS and (scripts := [i for i, w in enumerate(rest) if w.endswith(".py")]):
        path = rest[scripts[0]]
        if (ROOT / path).exists() or "/" in path:  # script.py is the user's own
            _script(ROOT / path, rest[scripts[0] + 1 :], sample)
    elif name.startswith("launch/"):
        assert (ROOT / name).exists(), f"no script {name}"
        _ours(["train", *rest], sample)
    elif name == "make":
        _make(rest)
    elif name == "pytest":
        for word in rest:
            assert not word.startswith("tests/") or (ROOT / word).exists(), f"no {word}"
    elif name == "pip" and rest[0] in {"install", "wheel"}:
        _pip(rest[1:])
    else:
        raise Unknown(name)


def _module_at(words):
    return next((i + 1 for i, w in enumerate(words) if w in {"-m", "--module"}), None)


def _ours(arguments, sample):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            told = [word for word in arguments if word not in VERBOSE]
            options, rest = _parser().parse_known_args(told)
    except SystemExit:
        raise AssertionError(f"slap-ds {' '.join(arguments)}: {said.getvalue()}") from None
    launched = getattr(options, "launcher", None)
    if isinstance(launched, list):
        check(launched[1:], sample)
        return
    if not getattr(options, "takes_overrides", False):
        assert not rest, f"slap-ds {' '.join(arguments)}: {rest} is unknown"
        return
    config = _config(options.config, sample)
    read_config(config, rest)
    methods = getattr(options, "method", [])
    for settings in (label_and_settings(method)[1] for method in methods):
        read_config(config, [*rest, *(f"--{each}" for each in settings.split(","))])


def _config(path, sample):
    if path.startswith("configs/"):
        assert (ROOT / path).exists(), f"no {path}"
        return str(ROOT / path)
    return str(sample)


def _script(path, arguments, sample):
    """Its own options stand in its text, the others are settings of its run file."""
    assert path.exists(), f"no {path}"
    text = path.read_text("utf-8")
    files = [word for word in arguments if word.endswith(".yaml")]
    given = [i for i, w in enumerate(arguments) if re.match(r"--\w+\.", w)]
    if given:
        rest = [w for i in given for w in arguments[i : i + 2]]
        read_config(_config(files[0], sample), rest)
    for i, word in enumerate(arguments):
        if word.startswith("--") and i not in given:
            assert f'"{word}"' in text, f"{path} has no {word}"


def _make(words):
    rules = re.findall(r"^([\w%. /-]+):(?!=)", MAKEFILE, re.MULTILINE)
    targets = [re.escape(name).replace("%", r"\w+") for rule in rules for name in rule.split()]
    for word in words:
        name, is_variable, _ = word.partition("=")
        if is_variable:
            assert f"$({name})" in MAKEFILE, f"make has no variable {name}"
        else:
            assert any(re.fullmatch(each, word) for each in targets), f"make has no {word}"


def _pip(words):
    for word in words:
        if named := re.match(r"(?:\.|slap_ds)\[(.*)\]$", word):
            assert not {*named[1].split(",")} - {*EXTRAS}, f"no extra in {word}"
    for flag, name in itertools.pairwise(words):
        assert flag != "-r" or (ROOT / name).exists(), f"no {name}"


def merged(below, above):
    """`above` over `below`, section by section."""
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = merged(below[key], above[key])
    return both


def run_file(text, base):
    """A YAML block laid over `base`, as YAML."""
    return yaml.safe_dump(merged(base, yaml.safe_load(text)))
