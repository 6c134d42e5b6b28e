"""From paths to rows: which files lie behind a path, and what rows stand in them.

    paths -> find_sources -> Source -> read_rows -> (row number, row or what is wrong with it)

JSON is read strictly, row by row, because real files hold rows that lax readers let through or
crash on: bad UTF-8, NaN, repeated keys, nesting without end. What is wrong with a row costs only
that row. A file that cannot be read on (a damaged archive, a `.json` that is no list) is an error,
because nobody could say how many rows went with it.
"""

import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

from slap_ds.compat import fingerprint_of
from slap_ds.files import sha256

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


def source_facts(sources: Sequence[Source]) -> list[list[Any]]:
    """What decides the rows of each source: its label (their default `source`), the SHA-256 of its
    files, and of a data set which part of them it is. Where the files lie does not count."""
    return [
        [
            source.label,
            [sha256(file) for file in source.files],
            None if source.dataset is None else fingerprint_of(source.dataset),
        ]
        for source in sources
    ]


def _summary(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _suffix(name: str) -> str:
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _file(path: Path) -> Source:
    suffix = _suffix(path.name)
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
            raise ValueError(f"{path}: unreadable saved data set: {_summary(error)}") from error
        return [_dataset(str(path), path.name, dataset)]
    # Not into sub-folders: what lies deeper (splits, caches) is for the user to name.
    files = [
        file for file in sorted(path.iterdir()) if _suffix(file.name) and file.name[0] not in "._"
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
    if match is None or _suffix(repository) or in_a_folder_here:
        raise FileNotFoundError(f"{name}: no such file or folder (looked from {Path.cwd()})")
    import datasets

    try:
        dataset = datasets.load_dataset(repository, split=match["split"] or "train")
    except Exception as error:  # any of several libraries' network, lookup and parsing errors
        raise ValueError(
            f"{name}: no such file or folder here, and no hub data set could be loaded:"
            f" {_summary(error)}"
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


@dataclass(frozen=True, slots=True)
class _Flaw:
    """Stands where the parser met what JSON does not allow, so that only this row is rejected."""

    reason: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Flaw:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Flaw("a key is repeated in one object")


def _whole_number(digits: str) -> int | _Flaw:
    return int(digits) if len(digits) <= 4300 else _Flaw("Exceeds the limit of 4300 digits")


_DECODER = json.JSONDecoder(
    parse_int=_whole_number,
    parse_constant=lambda name: _Flaw(f"{name} is not JSON"),
    object_pairs_hook=_object,
    strict=True,
)


def _check_json(row: object, limits: Limits) -> Mapping[str, Any]:
    """The row, if it is an object without flaws, broken characters or deep nesting.

    Raises ValueError.
    """
    level = [row]
    for _ in range(limits.depth):
        below: list[object] = []
        for value in level:
            if isinstance(value, _Flaw):
                raise ValueError(value.reason)
            if isinstance(value, str) and not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError:
                    raise ValueError(
                        "a text holds bytes that are not UTF-8, or half a surrogate pair"
                    ) from None
            elif isinstance(value, dict):
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
        if not below:
            break
        level = below
    else:
        raise ValueError(f"nested deeper than {limits.depth} levels")
    if not isinstance(row, dict):
        raise ValueError(f"the row is {kind_of(row)}, expected an object")
    return row


def _parse_line(line: bytes, limits: Limits) -> Mapping[str, Any]:
    try:
        return _check_json(_DECODER.decode(line.decode("utf-8")), limits)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte {error.start + 1} of the line is 0x{line[error.start]:02x}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {limits.depth} levels") from None


def _lines(file: IO[bytes], most: int) -> Iterator[tuple[int, bytes | ValueError]]:
    """Lines with their numbers, cut at b"\\n" only: text may hold U+2028 and its like.

    Blank lines hold no row.
    """
    number = 0
    while line := file.readline(most + 1):
        number += 1
        too_long = len(line) > most
        while len(line) > most and not line.endswith(b"\n"):
            line = file.readline(most + 1)
        if too_long:
            yield number, ValueError(f"the line is longer than {size_of(most)}")
        elif line := (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip():
            yield number, line


def _json_rows(path: Path, limits: Limits) -> Iterator[tuple[int, Mapping[str, Any] | ValueError]]:
    """Rows of a JSON file: one a line, or the members of the list that a `.json` begins with."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as opened:
            file = cast("IO[bytes]", opened)
            start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            lines_only = _suffix(path.name).startswith(".jsonl")
            if not lines_only and start.partition(b"\n")[0].rstrip() == b"{":
                raise ValueError(
                    "it holds one object over several lines: write a list of rows, or one row a "
                    "line (.jsonl)"
                )
            if start.startswith(b"[") and not lines_only:
                # A bad byte must cost its row, not the file: it stays on as half a surrogate pair.
                data = file.read(limits.list_bytes + 1)
                if len(data) > limits.list_bytes:
                    raise ValueError(
                        f"longer than {size_of(limits.list_bytes)}: write it as lines (.jsonl)"
                    )
                text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
                for number, row in enumerate(_DECODER.decode(text), 1):
                    try:
                        yield number, _check_json(row, limits)
                    except ValueError as error:
                        yield number, error
                return
            for number, line in _lines(file, limits.row_bytes):
                try:
                    yield (
                        number,
                        line if isinstance(line, ValueError) else _parse_line(line, limits),
                    )
                except ValueError as error:
                    yield number, error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: damaged archive, unreadable after row {number}: {error}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON list: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: not a list of rows: nested too deep to read") from None


def _table_rows(batches: Iterator[Any]) -> Iterator[tuple[int, Mapping[str, Any] | ValueError]]:
    """Rows of Arrow batches (or tables). A row that Python cannot hold costs only itself."""
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError):  # bad UTF-8, a date out of range, ...
            rows = [_table_row(batch.slice(index, 1)) for index in range(batch.num_rows)]
        for row in rows:
            number += 1
            yield number, row


def _table_row(batch: Any) -> Mapping[str, Any] | ValueError:
    try:
        row: Mapping[str, Any] = batch.to_pylist()[0]
        return row
    except UnicodeDecodeError:
        return ValueError("a text holds bytes that are not UTF-8")
    except (ValueError, OverflowError) as error:
        return ValueError(f"unreadable value: {_summary(error)}")


def read_rows(
    source: Source, limits: Limits | None = None
) -> Iterator[tuple[int, Mapping[str, Any] | ValueError]]:
    """Row numbers from 1, each with its row or what is wrong with it, in order.

    Raises ValueError where the file cannot be read on.
    """
    if source.dataset is not None:
        yield from _table_rows(source.dataset.with_format("arrow").iter(batch_size=1024))
    elif source.files[0].suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(source.files[0]) as file:
                yield from _table_rows(file.iter_batches(batch_size=1024))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{source.name}: unreadable Parquet file: {_summary(error)}"
            ) from error
    else:
        yield from _json_rows(source.files[0], limits or Limits())
