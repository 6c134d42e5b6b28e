"""From sources to rows: what stands in a file, read in order and parsed where there is time.

    Source -> read_raw -> (row number, raw) -> parsed -> (row number, row or what is wrong with it)

Reading is cheap and goes from a file's beginning to its end; parsing is not, and goes in any
process. JSON is read strictly, row by row, because real files hold rows that lax readers let
through or crash on: bad UTF-8, NaN, repeated keys, nesting without end. What is wrong with a row
costs only that row. A file that cannot be read on (a damaged archive, a `.json` that is no list) is
an error, because nobody could say how many rows went with it.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from slap_ds.data.sources import Limits, Source, kind_of, size_of, suffix_of, summary_of

TABLE_ROWS = 512

Parsed = tuple[int, Mapping[str, Any] | ValueError]


@dataclass(frozen=True)
class Table:
    """Rows of an Arrow table that stand together; they go to another process without the rest."""

    rows: Any  # pyarrow.Table

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.rows.schema) as stream:
            stream.write_table(self.rows)
        return _received, (sink.getvalue().to_pybytes(),)


def _received(data: bytes) -> Table:
    import pyarrow as pa

    with pa.ipc.open_stream(data) as stream:
        return Table(stream.read_all())


@dataclass(frozen=True, slots=True)
class Value:
    """A member of a JSON list, which is decoded as a whole."""

    row: Mapping[str, Any]


# bytes: a line of JSON; ValueError: what is wrong with the row.
Raw = bytes | ValueError | Value | Table


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


def _json_raw(path: Path, limits: Limits) -> Iterator[tuple[int, Raw]]:
    """Rows of a JSON file: one a line, or the members of the list that a `.json` begins with."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as opened:
            file = cast("IO[bytes]", opened)
            start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            lines_only = suffix_of(path.name).startswith(".jsonl")
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
                    try:  # here, for what is nested too deep cannot go to another process
                        yield number, Value(_check_json(row, limits))
                    except ValueError as error:
                        yield number, error
                return
            for number, line in _lines(file, limits.row_bytes):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: damaged archive, unreadable after row {number}: {error}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON list: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: not a list of rows: nested too deep to read") from None


def _tables(batches: Iterator[Any]) -> Iterator[tuple[int, Raw]]:
    """Arrow batches (or tables) as tables."""
    import pyarrow as pa

    number = 1
    for batch in batches:
        whole = isinstance(batch, pa.Table)
        yield number, Table(batch if whole else pa.Table.from_batches([batch]))
        number += len(batch)


def _table_rows(table: Any) -> list[Mapping[str, Any] | ValueError]:
    """A row that Python cannot hold costs only itself."""
    try:
        rows: list[Mapping[str, Any] | ValueError] = table.to_pylist()
        return rows
    except (ValueError, OverflowError):  # bad UTF-8, a date out of range, ...
        return [_table_row(table.slice(index, 1)) for index in range(len(table))]


def _table_row(table: Any) -> Mapping[str, Any] | ValueError:
    try:
        row: Mapping[str, Any] = table.to_pylist()[0]
        return row
    except UnicodeDecodeError:
        return ValueError("a text holds bytes that are not UTF-8")
    except (ValueError, OverflowError) as error:
        return ValueError(f"unreadable value: {summary_of(error)}")


def read_raw(source: Source, limits: Limits) -> Iterator[tuple[int, Raw]]:
    """What stands in a source, in order, with row numbers from 1 (of a table its first row's).

    Raises ValueError where the file cannot be read on.
    """
    if source.dataset is not None:
        yield from _tables(source.dataset.with_format("arrow").iter(batch_size=TABLE_ROWS))
    elif source.files[0].suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(source.files[0]) as file:
                yield from _tables(file.iter_batches(batch_size=TABLE_ROWS))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{source.name}: unreadable Parquet file: {summary_of(error)}"
            ) from error
    else:
        yield from _json_raw(source.files[0], limits)


def parsed(number: int, raw: Raw, limits: Limits) -> Iterator[Parsed]:
    """The row that `raw` holds, or those of a table, or what is wrong with them."""
    if isinstance(raw, Table):
        yield from enumerate(_table_rows(raw.rows), number)
    elif isinstance(raw, bytes):
        try:
            yield number, _parse_line(raw, limits)
        except ValueError as error:
            yield number, error
    else:
        yield number, raw.row if isinstance(raw, Value) else raw


def read_rows(source: Source, limits: Limits | None = None) -> Iterator[Parsed]:
    """Row numbers from 1, each with its row or what is wrong with it, in order.

    Raises ValueError where the file cannot be read on.
    """
    limits = limits or Limits()
    for number, raw in read_raw(source, limits):
        yield from parsed(number, raw, limits)
