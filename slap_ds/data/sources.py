"""From paths to sources: which files lie behind a path. `rows` reads what stands in them."""

import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl.gz", ".jsonl", ".json.gz", ".json", ".parquet")
DEMO = Path(__file__).parent / "demo"
HUB_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(:(?P<split>.+))?")
BUILTIN = {"builtin:demo/train": DEMO / "train.jsonl", "builtin:demo/eval": DEMO / "eval.jsonl"}


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a row may be; a larger one is rejected, whatever is in it."""

    row_bytes: int = 16 * 2**20
    depth: int = 64  # of lists and objects in each other
    # A `.json` list is held in memory whole; a small archive may unpack to any size.
    list_bytes: int = 2**30


@dataclass(frozen=True, slots=True)
class Source:
    """One file, or one data set of the `datasets` library.

    `name` is what messages call it, `label` the `source` of rows that name none, `files` what it
    is read from.
    """

    name: str
    label: str
    files: tuple[Path, ...]
    dataset: Any = None


def summary_of(error: Exception) -> str:
    """Its first line, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def suffix_of(name: str) -> str:
    """Which of SUFFIXES a file's name ends in; "" for none."""
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _file(path: Path) -> Source:
    suffix = suffix_of(path.name)
    if not suffix:
        raise ValueError(
            f"{path}: unknown kind of file; expected one that ends in {', '.join(SUFFIXES)}"
        )
    return Source(str(path), _shown(path.name.removesuffix(suffix)), (path,))


def _shown(name: str) -> str:
    """A name as text that can be written anywhere: bytes that are not UTF-8 stand as \\xd0."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _dataset(name: str, label: str, dataset: Any) -> Source:
    files = tuple(sorted({Path(entry["filename"]) for entry in dataset.cache_files}))
    return Source(name, label, files, dataset)


def _folder(path: Path) -> list[Source]:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]
        raise ValueError(
            f"{path} holds the splits {', '.join(splits)}: name one, as {path / splits[0]}"
        )
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        import datasets

        try:
            dataset = datasets.load_from_disk(str(path))
        except Exception as error:  # whatever its reader makes of a damaged folder
            raise ValueError(f"{path}: unreadable saved data set: {summary_of(error)}") from error
        return [_dataset(str(path), path.name, dataset)]
    # Not into sub-folders: what lies deeper (splits, caches) is for the user to name.
    files = [
        file for file in sorted(path.iterdir()) if suffix_of(file.name) and file.name[0] not in "._"
    ]
    if not files:
        raise FileNotFoundError(
            f"{path}: no data files in this folder (looked for {', '.join(SUFFIXES)}); for files in"
            f" sub-folders write a pattern, as {path}/**/*.jsonl"
        )
    return [_file(file) for file in files]


def _hub(name: str) -> Source:
    if "://" in name:
        shown = re.sub(r"://[^/@\s]+@", "://***@", name)  # it may hold a password
        raise ValueError(f"{shown}: addresses are not read; download the file and name its path")
    match = HUB_NAME.fullmatch(name)
    repository = match["repository"] if match else ""
    # A mistyped path must not become a question to the hub: that would be slow, leak the path, and
    # could even find something.
    in_a_folder_here = "/" in repository and Path(repository).parent.is_dir()
    if match is None or suffix_of(repository) or in_a_folder_here:
        raise FileNotFoundError(f"{name}: no such file or folder (looked from {Path.cwd()})")
    import datasets

    try:
        dataset = datasets.load_dataset(repository, split=match["split"] or "train")
    except Exception as error:  # any of several libraries' network, lookup and parsing errors
        raise ValueError(
            f"{name}: no such file or folder here, and no hub data set could be loaded:"
            f" {summary_of(error)}"
        ) from error
    return _dataset(name, repository.split("/")[-1], dataset)


def find_sources(paths: Sequence[str]) -> list[Source]:
    """The files behind paths, in their order; folders and patterns sorted by name.

    A path is a file, a folder, a pattern (`*`, `?`, `[...]`, `**`), a name of BUILTIN, or the
    `name` or `name:split` of a hub data set. Raises FileNotFoundError (nothing there) or
    ValueError (nothing that can be read).
    """
    if isinstance(paths, str):
        raise ValueError(f"data paths must be a list: write [{paths!r}]")
    sources: list[Source] = []
    for name in paths:
        path = Path(name).expanduser()
        if name.startswith("builtin:"):
            if name not in BUILTIN:
                raise ValueError(
                    f"{name}: no such data in the package; it has {', '.join(BUILTIN)}"
                )
            if not BUILTIN[name].is_file():
                raise FileNotFoundError(f"{name}: the package was installed without its demo data")
            sources.append(replace(_file(BUILTIN[name]), name=name))
        elif path.is_dir():
            sources += _folder(path)
        elif path.exists():
            sources.append(_file(path))
        elif re.search(r"[*?[]", name) and not HUB_NAME.fullmatch(name):
            matches = sorted(
                match for match in glob.glob(str(path), recursive=True) if Path(match).is_file()
            )
            if not matches:
                raise FileNotFoundError(
                    f"{name}: no file matches this pattern (looked from {Path.cwd()})"
                )
            sources += [_file(Path(match)) for match in matches]
        else:
            sources.append(_hub(name))
    return sources


def size_of(size: int) -> str:
    """Bytes as a user would say them."""
    return f"{size >> 20} MiB" if size >= 2**20 else f"{size:,} bytes"


def kind_of(value: object) -> str:
    """What a user would call the type of a value."""
    names = {
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "text",
    }
    return "missing" if value is None else names.get(type(value), type(value).__name__)
