"""Rows of a table, whatever its file's format: CSV, TSV, JSON lines or Parquet.

Source: Python's csv module for separators and quotes; https://jsonlines.org; pyarrow for Parquet.
"""

import csv
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from unimo3.errors import ConfigError, DataError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (*SEPARATORS, ".jsonl", ".parquet")
# Characters of a field of a CSV at most, in columns that are not read too, such as images in base64.
_MAX_FIELD = 2**24
# What may separate the columns of a file whose header looks like one column.
_SEPARATOR = re.compile(r"[;,|\t]")
# A byte that the encoding does not have, as surrogateescape decodes it.
_ESCAPED = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class TableOptions:
    """How a text file is read.

    Attributes:
        separator: between columns; empty: by the file's ending.
        has_quotes: whether a field may be in double quotes. False: a quote is a character like any other.
        encoding: of CSV, TSV and the text files of a folder; JSON lines are UTF-8.
    """

    separator: str = ""
    has_quotes: bool = True
    encoding: str = "utf-8"


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        where: the file and the row's position in it, for messages.
        values: by the column's name.
        problem: why the row has no values; else empty.
    """

    where: str
    values: dict[str, Any]
    problem: str = ""


def read_table(path: Path, columns: Sequence[str], options: TableOptions) -> Iterator[Row]:
    """Each row of a file with its values of `columns`; other columns are optional.

    Raises:
        ConfigError: the encoding does not exist.
        DataError: the file cannot be read, or lacks a column.
    """
    ending = path.suffix.lower()
    try:
        if ending == ".parquet":
            yield from _read_parquet(path, columns)
        elif ending == ".jsonl":
            yield from _read_json_lines(path, columns)
        elif ending in SEPARATORS:
            yield from _read_csv(path, columns, options, options.separator or SEPARATORS[ending])
        else:
            raise DataError(f"--src {path}: is not a table; name a folder or a file that ends in {', '.join(ENDINGS)}")
    except OSError as error:
        raise DataError(f"--src {path}: cannot be read ({error.strerror or error})") from error


class _Lines:
    """Lines of a file for `csv.reader`, of which those after the first of a record can be read again."""

    def __init__(self, file: TextIO):
        self._file = file
        self._again: deque[str] = deque()
        self._record: list[str] = []
        self.num_read = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._file)
        self._record.append(line)
        self.num_read += 1
        return line

    def start_record(self) -> None:
        """The next line is the first of a record."""
        self._record.clear()

    def end_after_first(self) -> None:
        """End the record after its first line."""
        self._again.extendleft(reversed(self._record[1:]))
        self.num_read -= len(self._record[1:])
        del self._record[1:]

    def bad_byte(self) -> str:
        """The first byte of the record that could not be decoded, such as ``0xea``; empty: none."""
        for line in self._record:
            if not line.isascii() and (match := _ESCAPED.search(line)):
                return f"0x{ord(match[0]) - 0xDC00:02x}"
        return ""


def _read_csv(path: Path, columns: Sequence[str], options: TableOptions, separator: str) -> Iterator[Row]:
    encoding = "utf-8-sig" if options.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else options.encoding
    header: list[str] | None = None
    lines = None
    try:
        with path.open(newline="", encoding=encoding, errors="surrogateescape") as file:
            lines = _Lines(file)
            for first_line, fields, problem in _csv_records(lines, options, separator):
                where = f"{path}: line {first_line}"
                if not fields and not problem:
                    continue
                if header is None:
                    if problem:
                        raise DataError(f"{where}: {problem}")
                    header = [name.strip() for name in fields]
                    _check_columns(path, columns, header)
                elif problem:
                    yield Row(where, {}, problem)
                elif len(fields) != len(header):
                    yield Row(where, {}, f"has {len(fields)} columns, the header has {len(header)}")
                else:
                    yield Row(where, dict(zip(header, fields, strict=True)))
    except LookupError as error:
        raise ConfigError(f"--encoding {options.encoding}: {error}") from error
    except UnicodeDecodeError as error:  # of an encoding in which a bad byte hides where the next character begins
        after = f"after line {lines.num_read}: " if lines and lines.num_read else ""
        raise DataError(f"{path}: {after}is not {options.encoding} ({error}); give its --encoding") from error
    if header is None:
        raise DataError(f"{path}: is empty; a line with the names of the columns is needed")


def _csv_records(lines: _Lines, options: TableOptions, separator: str) -> Iterator[tuple[int, list[str], str]]:
    """Each record: the number of its first line, its fields, and why it cannot be used, else empty."""
    csv.field_size_limit(_MAX_FIELD)
    # Strict: else a quote without its partner would swallow the rows up to the next quote.
    reader = csv.reader(
        lines,
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if options.has_quotes else csv.QUOTE_NONE,
        strict=True,
    )
    while True:
        lines.start_record()
        first_line = lines.num_read + 1
        fields: list[str] = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The rows that an unclosed quote has swallowed may be good.
            lines.end_after_first()
            problem = f"{error}; double the quotes inside a quoted field, or give --no-quotes if they are part of texts"
        else:
            problem = ""
        if byte := lines.bad_byte():
            problem = f"is not {options.encoding} (byte {byte}); give the file's --encoding, or correct this line"
        yield first_line, fields, problem


def _read_json_lines(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    is_checked = False
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                yield Row(where, {}, f"is not JSON ({error})")
                continue
            if not isinstance(values, dict):
                yield Row(where, {}, "is not a JSON object")
                continue
            if not is_checked:
                _check_columns(path, columns, list(values))
                is_checked = True
            yield Row(where, values)


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(f"--src {path}: Parquet needs pyarrow; type: pip install 'unimo3[parquet]'") from error
    try:
        with ParquetFile(path) as file:
            _check_columns(path, columns, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
                for values in batch.to_pylist():
                    yield Row(f"{path}: row {number}", values)
                    number += 1
    except ArrowException as error:
        raise DataError(f"{path}: is not Parquet, or is damaged ({error}); copy it again") from error


def _check_columns(path: Path, columns: Sequence[str], header: Sequence[str]) -> None:
    repeated = sorted({name for name in columns if header.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: has several columns named {repeated[0]!r}; rename one")
    missing = [name for name in columns if name not in header]
    if missing:
        is_unsplit = len(header) == 1 and _SEPARATOR.search(header[0])
        raise DataError(
            f"{path}: has no column {missing[0]!r}; its columns are {', '.join(map(repr, header[:20]))}; give "
            "--image-column, --caption-column, --id-column and --split-column as the file names them"
            + (f", or --separator {is_unsplit[0]!r} if it separates columns" if is_unsplit else "")
        )
