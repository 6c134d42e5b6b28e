"""What the site has beside docs/*.md: pages of the repository, and pages made from the code.

    README, CONTRIBUTING, ... -> pages and files at the places where links of docs/ look for them
    schema, parsers, docstrings -> reference/settings.md, reference/cli.md, reference/python.md

MkDocs calls `on_files` with what lies in docs/, and `on_page_markdown` with the text of each page.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import slap_ds
from slap_ds.cli import _parser
from slap_ds.config.file import config_keys

ROOT = Path(__file__).resolve().parents[2]
# [text](target) and ![text](target); not an address, not a place on the same page.
LINK = re.compile(r"(\[[^\]]*\]\()(?!\w+:|#)([^)#\s]+)")

SETTINGS = """# Settings

What a run file may hold: each setting with its allowed values and its default, as
`slap-ds settings` prints them. Any of them can be given on the command line too:
`--selection.keep 0.8`.
"""
COMMANDS = """# Commands

The help of every command. Those that take a run file take its settings too, such as
`--selection.keep 0.8`; `-v` lets the notes and warnings of libraries out.
"""
PYTHON = """# Python

What `import slap_ds` offers. [From Python](../api.md) has examples.
"""


def on_files(files: Files, config: Any) -> Files:
    """Add the made pages, and whatever the pages link to outside docs/."""
    made = {"settings": settings(), "cli": commands(), "python": python()}
    for name, text in made.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    found = {ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")}
    waiting = [*found, *(ROOT / "docs").glob("*.md")]
    while waiting:
        page = waiting.pop()
        for target in linked(page):
            if target not in found and ROOT / "docs" not in target.parents:
                found.add(target)
                waiting += [target] if target.suffix == ".md" else []
    for path in sorted(found):
        files.append(File.generated(config, place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository become links between their places in the site."""
    uri = page.file.src_uri
    if uri.startswith("reference/"):
        return markdown
    source = source_of(uri)

    def moved(match: re.Match[str]) -> str:
        target = place((source.parent / match[2]).resolve())
        return match[1] + os.path.relpath(target, Path(uri).parent)

    return LINK.sub(moved, markdown)


def linked(page: Path) -> list[Path]:
    """Files of the repository that a page links to."""
    return [(page.parent / m[2]).resolve() for m in LINK.finditer(page.read_text("utf-8"))]


def place(path: Path) -> str:
    """Where a file of the repository lies in the site: docs/ is its root, README its first page."""
    inside = path.relative_to(ROOT)
    if inside == Path("README.md"):
        return "index.md"
    return str(inside.relative_to("docs") if inside.parts[0] == "docs" else inside)


def source_of(uri: str) -> Path:
    """The file that a page of the site was made of."""
    if uri == "index.md":
        return ROOT / "README.md"
    inside = ROOT / "docs" / uri
    return inside if inside.exists() else ROOT / uri


def settings() -> str:
    """Every setting of a run file, by section."""
    text, section = SETTINGS, ""
    for key, explained in config_keys():
        if (parent := key.rpartition(".")[0]) != section:
            text, section = f"{text}\n## {parent}\n", parent
        text += f"\n### `{key}`\n\n{explained}\n"
    return text


def commands() -> str:
    """The help of every command."""
    os.environ["COLUMNS"] = "90"  # argparse fills lines as wide as the terminal is
    helps = "".join(f"\n## {p.prog}\n\n```text\n{p.format_help()}```\n" for p in leaves(_parser()))
    return COMMANDS + helps


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of commands that have no commands below them."""
    below = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield parser
    for each in below:
        for one in each.values():
            yield from leaves(one)


def python() -> str:
    """The docstring of every public name; Config has a page of its own."""
    # Of these two there is a folder or file of the same name, which would be taken instead.
    homes = {**slap_ds._HOMES, "train": "slap_ds.train.call"}
    homes["farthest_point"] = "slap_ds.ops.farthest_point"
    text = PYTHON
    for name in slap_ds.__all__:
        if name != "__version__":
            text += f"\n::: {homes[name]}.{name}\n"
            text += "    options: {members: false}\n" if name == "Config" else ""
    return text
