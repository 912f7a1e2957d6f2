"""The samples that a converter yields, and the readers of a source's records that all converters use.

Every error is a `DataError` that names the file, the record, the field, its value and the fix.

Source: RFC 8259 (JSON) and https://jsonlines.org for the two kinds of file.
"""

import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from unimo3.errors import DataError
from unimo3.texts import is_blank, plain

Kind = TypeVar("Kind")

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Sample:
    """The images that belong together, and the texts about them.

    Attributes:
        key: unique in its split, without dots or slashes.
        images: their files; one, or two for NLVR2.
        content: of the sample's ``json``; has ``image_id`` and the format's texts.
        problem: why the record is rejected, with its position in the source as `images`; empty: it is good so far.
    """

    key: str
    images: tuple[Path, ...]
    content: dict[str, Any]
    problem: str = ""

    @property
    def ids(self) -> tuple[int | str, ...]:
        """The names of its entries in the files that the data set's evaluation reads; none of captions."""
        if "identifier" in self.content:
            return (self.content["identifier"],)
        questions = [question["question_id"] for question in self.content.get("questions", [])]
        return (*questions, *(hypothesis["pair_id"] for hypothesis in self.content.get("hypotheses", [])))


class Converter(Protocol):
    """Reads one format."""

    def __call__(self, source: Path, images: Path, omitted: Counter[str] | None = None) -> Iterator[tuple[str, Sample]]:
        """Yield (split, sample) in the order of the source.

        Args:
            source: folder of the annotation files.
            images: folder of the image files, which are named and not opened.
            omitted: gets, by reason, the number of records that the format allows to be unusable and that are skipped.

        Raises:
            DataError: a file or a record does not have the format.
        """


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """The content of a JSON file whose outermost value is a `kind`."""
    try:
        content = _loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(content, kind):
        raise DataError(
            f"{path}: is {reprlib.repr(content)}; {kind.__name__} expected as the outermost value, as in the public "
            "release"
        )
    return content


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    r"""Each line's position in the file, for messages, and its text. Only ``\n`` and ``\r\n`` end a line."""
    try:
        # Bytes, because text files also break at a lone \r, and decoding in blocks would report the wrong line.
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}: line {number}"
                try:
                    content = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{where}: is not UTF-8 ({error}); download the file again") from error
                yield where, content.rstrip("\r\n")
    except OSError as error:
        raise _unreadable(path, error) from error


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record's position in a file of JSON lines, for messages, and the record; blank lines are skipped.

    Raises:
        DataError: there is none, so that no split is missed.
    """
    is_empty = True
    for where, line in read_lines(path):
        if not line.strip():
            continue
        is_empty = False
        try:
            record = _loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: is not JSON ({error}); download the file again") from error
        yield where, record
    if is_empty:
        raise DataError(f"{path}: has no record; download it again")


def first_file(*paths: Path) -> Path:
    """The first of `paths` that exists, else the very first, for its reader to miss."""
    return next((path for path in paths if path.is_file()), paths[0])


def field(record: Any, name: str, where: str | Path, kind: type[Kind]) -> Kind:
    """A record's field, if it is a `kind`; true and false are no numbers."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: is {reprlib.repr(record)}; an object with the field '{name}' expected")
    value = record.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        state = "is missing" if value is None else f"is {reprlib.repr(value)}"
        raise DataError(f"{where}: field '{name}' {state}; {kind.__name__} expected, as in the public release")
    return value


def text(record: Any, name: str, where: str) -> str:
    """A record's text, stripped, which must not be empty."""
    value = plain(field(record, name, where, str))
    if is_blank(value):
        raise DataError(f"{where}: field '{name}' is empty; remove the record or give it a text")
    return value


def choice(record: Any, name: str, where: str, options: Sequence[str]) -> str:
    """A record's text, which must be one of `options`."""
    value = field(record, name, where, str)
    if value not in options:
        raise DataError(f"{where}: field '{name}' is {value!r}; one of {', '.join(options)} expected")
    return value


def distinct(captions: Iterable[str]) -> list[str]:
    """The captions, stripped, without empty and repeated ones, in the order of their first appearance."""
    return list(dict.fromkeys(plain(caption) for caption in captions if not is_blank(caption)))


def _loads(text: str) -> Any:
    """The value of a JSON text, in which half of a surrogate pair, which no file can store, becomes "?"."""
    value = json.loads(text)
    return _storable(value) if _ESCAPED_SURROGATE.search(text) else value


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_storable(entry) for entry in value]
    if isinstance(value, dict):
        return {_storable(name): _storable(entry) for name, entry in value.items()}
    return value


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: cannot be read ({error.strerror}); --src must name the data set's folder, with this file"
    )
