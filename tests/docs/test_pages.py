"""Every block of README and docs/ is of a known kind, and every command in it is a real one.

A block of commands is parsed by what it names (commands.py), or stands under a mark:

    <!-- run -->              tests/docs/test_start.py runs it, with the others of its page
    <!-- needs: cluster -->   it has commands that are not ours and need what is named

Commands of ours are parsed under a mark too.
"""

import ast
import re

import pytest
import yaml

from slap_ds.config.file import read_config, validated
from slap_ds.study.plan import Study
from tests.docs.commands import ROOT, Unknown, check, commands, run_file

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
KINDS = {"sh", "python", "yaml", "json", "toml", "text"}
NEEDS = {"cluster", "gpu", "network", "docker"}
BLOCK = re.compile(r"(?:^<!-- (.*?) -->\n)?^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path, kind=None):
    """(mark, text) of a page's blocks of a kind; (kind, text) of all."""
    found = BLOCK.findall(path.read_text("utf-8"))
    if kind is None:
        return [(k, text) for _, k, text in found]
    return [(mark, text) for mark, k, text in found if k == kind]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """README's run file, which stands for the reader's own wherever a page names one."""
    path = tmp_path_factory.mktemp("docs") / "my.yaml"
    path.write_text(blocks(ROOT / "README.md", "yaml")[0][1], "utf-8")
    return path


def name(path):
    return path.stem


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_blocks_are_fenced_and_of_a_known_kind(path):
    text = path.read_text("utf-8")
    kinds = {kind for kind, _ in blocks(path)}
    assert kinds <= KINDS
    assert text.count("\n```") == 2 * len(blocks(path)), "a fence is open, or not at a line's start"
    assert not re.search(r"\n\n {4}\S", BLOCK.sub("", text)), "a block without fences"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_are_real(path, sample):
    for mark, block in blocks(path, "sh"):
        if mark == "run":
            assert path.stem in RUN, "no test runs this page"
            continue
        needs = mark.removeprefix("needs: ").split(", ") if mark.startswith("needs: ") else []
        assert {*needs} <= NEEDS
        for words in commands(block):
            try:
                check(words, sample)
            except Unknown as unknown:
                if not needs:
                    pytest.fail(f"{path.name}: {unknown} is not checked: mark what it needs")


RUN = {"start"}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_settings_are_real(path, sample, tmp_path):
    base = yaml.safe_load(sample.read_text("utf-8"))
    for _, block in blocks(path, "yaml"):
        raw = yaml.safe_load(block)
        if "grid" in raw:
            validated(Study, raw, path.name)
        else:
            (tmp_path / "run.yaml").write_text(run_file(block, base), "utf-8")
            read_config(str(tmp_path / "run.yaml"))


def test_the_lines_of_troubleshooting_are_ours():
    """Each line that the page quotes, `...` standing for what varies, is in the code."""
    ours = [text for path in (ROOT / "slap_ds").rglob("*.py") for text in literals(path)]
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quoted = re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\| (.*?) \|", page, re.MULTILINE)))
    assert len(quoted) > 30
    for line in quoted:
        pattern = re.compile(r".*?".join(map(re.escape, line.split("..."))), re.DOTALL)
        assert any(pattern.search(text) for text in ours), line


def literals(path):
    """The texts in a module; what is put into an f-string is left out."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value for v in node.values if isinstance(v, ast.Constant))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_what_is_wrong_is_seen(sample):
    wrong = {
        "slap-ds trian my.yaml": "invalid choice",
        "slap-ds export runs/my --pull x": "unknown",
        "slap-ds report": "required",
        "slap-ds launch -- deepspeed --module slap_ds train my.yaml --selection.kept 1": "kept",
        "torchrun -m slap_ds train my.yaml --selection.keep 2": "keep",
        "HOSTFILE=h launch/no_node.sh my.yaml": "no script",
        "python benchmarks/bench_step.py --round 5": "--round",
        "make tset": "make has no tset",
        "make demo GPUZ=1": "GPUZ",
        "pip install 'slap_ds[lroa]'": "extra",
        "pytest tests/none.py": "no tests/none.py",
    }
    for command, said in wrong.items():
        (words,) = commands(command)
        with pytest.raises((AssertionError, ValueError), match=said):
            check(words, sample)
    with pytest.raises(Unknown):
        check(["docker", "run"], sample)
