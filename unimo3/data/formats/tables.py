"""Rows of a table, whatever its file's format: CSV, TSV, JSON lines or Parquet.

Source: Python's csv module for separators and quotes; https://jsonlines.org; pyarrow for Parquet.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from unimo3.errors import ConfigError, DataError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (*SEPARATORS, ".jsonl", ".parquet")


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


def _read_csv(path: Path, columns: Sequence[str], options: TableOptions, separator: str) -> Iterator[Row]:
    encoding = "utf-8-sig" if options.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else options.encoding
    header: list[str] | None = None
    try:
        with path.open(newline="", encoding=encoding) as file:
            # Strict: else a quote without its partner would swallow the rows up to the next quote.
            reader = csv.reader(
                file,
                delimiter=separator,
                quoting=csv.QUOTE_MINIMAL if options.has_quotes else csv.QUOTE_NONE,
                strict=True,
            )
            for fields in reader:
                where = f"{path}: line {reader.line_num}"
                if not fields:
                    continue
                if header is None:
                    header = [name.strip() for name in fields]
                    _check_columns(path, columns, header)
                elif len(fields) != len(header):
                    yield Row(where, {}, f"has {len(fields)} columns, the header has {len(header)}")
                else:
                    yield Row(where, dict(zip(header, fields, strict=True)))
    except LookupError as error:
        raise ConfigError(f"--encoding {options.encoding}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not {options.encoding} ({error}); give its --encoding") from error
    except csv.Error as error:
        raise DataError(
            f"{path}: line {reader.line_num}: {error}; double the quotes inside a quoted field, or give --no-quotes if "
            "quotes are part of the texts"
        ) from error
    if header is None:
        raise DataError(f"{path}: is empty; a line with the names of the columns is needed")


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
        raise DataError(
            f"{path}: has no column {missing[0]!r}; its columns are {', '.join(map(repr, header[:20]))}; give "
            "--image-column, --caption-column, --id-column and --split-column as the file names them"
        )
