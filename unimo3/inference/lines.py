"""A file of JSON lines in, a file of JSON lines out.

Each line of the result has the number of the source line that it answers:

    {"line": 1, "input": {"image": "a.jpg", "text": "what is it?"}, "answers": [{"answer": "dog", "score": 0.9}, ...]}
    {"line": 2, "input": {...}, "error": "b.jpg: cannot be read (No such file or directory); name an image file"}

Source: the JSON Lines format, https://jsonlines.org.
"""

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from unimo3.errors import ConfigError, DataError
from unimo3.inference.inputs import checked_text
from unimo3.inference.predictors import Answers
from unimo3.inference.prefetch import one_ahead

_NUM_ERRORS_SHOWN = 10
_BLANK = re.compile(rb"^(?:\s|\xef\xbb\xbf)+|\s+$")
_TOO_DEEP = "is nested too deeply; give it without the nested field"

Prepared = TypeVar("Prepared")


class Answerer(NamedTuple, Generic[Prepared]):
    """How lines are answered.

    Attributes:
        parse: an object of the source -> what is asked, with its files read; raises DataError.
        answer: answers to a batch of those; raises DataError where that is a batch of one.
        batch: lines at a time.
    """

    parse: Callable[[dict[str, Any]], Prepared]
    answer: Callable[[list[Prepared]], list[Answers]]
    batch: int


class _Line(NamedTuple):
    number: int
    content: Any
    asked: Any
    problem: str


def count_lines(source: Path) -> int:
    """Lines that are not blank.

    Raises:
        ConfigError: the file cannot be read, or is UTF-16.
    """
    try:
        with source.open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ConfigError(f"--input {source}: is UTF-16; save it as UTF-8")
            file.seek(0)
            return sum(1 for line in file if _content(line))
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--input {source}: cannot be read ({reason}); name a file of JSON lines") from error


def answer_file(
    source: Path, target: Path, how: Answerer[Any], done: Callable[[int], Any] = lambda count: None
) -> tuple[int, list[str]]:
    """Answer every line; the target appears, or is replaced, by a rename when all is in it.

    Args:
        done: called with each batch's number of lines.

    Returns:
        The number of lines, and the errors of those that could not be answered, each with its line number.

    Raises:
        ConfigError: a file cannot be read or written.
        DataError: the source contains no line.
    """
    target = target.resolve()  # a link stays one
    staging = target.with_name(f"{target.name}.partial")
    num_lines = 0
    errors: list[str] = []
    try:
        with source.open("rb") as file, staging.open("w", encoding="utf-8") as out:
            for lines in one_ahead(partial(_parse, how.parse), _batches(file, how.batch)):
                for record in _answer(lines, how.answer):
                    try:
                        line = encoded(record)
                    except RecursionError:  # writing begins deeper in the stack than reading
                        record = {"line": record["line"], "input": None, "error": _TOO_DEEP}
                        line = encoded(record)
                    except DataError as error:
                        record = {"line": record["line"], "input": record["input"], "error": str(error)}
                        line = encoded(record)
                    if "error" in record:
                        errors.append(f"line {record['line']}: {record['error']}")
                    out.write(line + "\n")
                num_lines += len(lines)
                done(len(lines))
        if not num_lines:
            raise DataError(f"--input {source}: contains no line; write one object a line")
        staging.replace(target)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or target}: {error.strerror}; check the path, space and permissions"
        ) from error
    finally:
        staging.unlink(missing_ok=True)
    return num_lines, errors


def encoded(record: dict[str, Any]) -> str:
    """A record with answers as JSON.

    Raises:
        DataError: a score is NaN or infinite, which JSON does not have.
    """
    try:
        return json.dumps(record, ensure_ascii=True, allow_nan=False)
    except ValueError as error:
        raise DataError("a score is no finite number; verify the weights, or export them again") from error


def error_message(source: Path, target: Path, num_lines: int, errors: list[str]) -> str:
    """The error of a file some of whose lines could not be answered."""
    more = f"\n  and {len(errors) - _NUM_ERRORS_SHOWN} more" if len(errors) > _NUM_ERRORS_SHOWN else ""
    return (
        f"{source}: {len(errors)} of {num_lines} lines were not answered; {target} has the others, and each error:\n  "
        + "\n  ".join(errors[:_NUM_ERRORS_SHOWN])
        + more
    )


def text_of(fields: dict[str, Any]) -> str:
    """The field ``text``.

    Raises:
        DataError: it is missing, no text or empty.
    """
    if "text" not in fields:
        raise DataError(f'has no "text" (fields: {", ".join(fields) or "none"})')
    return checked_text(fields["text"], "text")


def images_of(fields: dict[str, Any], num_images: int, folder: Path) -> tuple[Path, ...]:
    """The field ``image``: a path, or a list of as many as the task takes.

    Args:
        folder: what relative paths start from.

    Raises:
        DataError: it is missing, or has another form or number.
    """
    if "image" not in fields:
        raise DataError(f'has no "image" (fields: {", ".join(fields) or "none"})')
    value = fields["image"]
    names = value if isinstance(value, list) else [value]
    if len(names) != num_images or not all(isinstance(name, str) and name for name in names):
        form = "a path" if num_images == 1 else f"a list of {num_images} paths"
        raise DataError(f"image: {json.dumps(value)}: {form} is needed")
    return tuple(folder / name for name in names)


def _content(line: bytes) -> bytes:
    """A line without blanks and byte-order marks before it, which files made of several have inside too."""
    return _BLANK.sub(b"", line)


def _batches(file: Any, batch: int) -> Iterator[list[tuple[int, bytes]]]:
    lines: list[tuple[int, bytes]] = []
    for number, line in enumerate(file, start=1):
        if content := _content(line):
            lines.append((number, content))
        if len(lines) == batch:
            yield lines
            lines = []
    if lines:
        yield lines


def _parse(parse: Callable[[dict[str, Any]], Any], batch: list[tuple[int, bytes]]) -> list[_Line]:
    parsed = []
    for number, line in batch:
        content: Any = None
        try:
            try:
                content = json.loads(line.decode(), parse_float=_finite, parse_constant=_finite)
            except ValueError as error:
                raise DataError(f"is no JSON ({error})") from error
            if not isinstance(content, dict):
                raise DataError(f'is a {type(content).__name__}; an object such as {{"text": ...}} is needed')
            parsed.append(_Line(number, content, parse(content), ""))
        except DataError as error:
            parsed.append(_Line(number, content, None, str(error)))
        except RecursionError:
            parsed.append(_Line(number, None, None, _TOO_DEEP))
    return parsed


def _finite(number: str) -> float:
    """A JSON number; one that is too large for a float would be written as Infinity, which is no JSON."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no finite number")
    return value


def _answer(lines: list[_Line], answer: Callable[[list[Any]], list[Answers]]) -> Iterator[dict[str, Any]]:
    """The records of a batch, in order."""
    asked = [line.asked for line in lines if not line.problem]
    problem = ""
    answers: Iterator[Answers] = iter(())
    try:
        answers = iter(answer(asked) if asked else [])
    except DataError as error:
        problem = str(error)
    for line in lines:
        record = {"line": line.number, "input": line.content}
        if line.problem or problem:
            yield {**record, "error": line.problem or problem}
        else:
            yield {**record, "answers": next(answers)}
