"""The form of an ``index.json``: its shards' entries, and what its fields may be.

Source: none.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unimo3.data.members import COUNTED_KINDS

# Above what any file has, and low enough for sums and offsets.
_MAX_COUNT = 2**53


@dataclass(frozen=True)
class Shard:
    """One tar file, and its table of members in ``index.members``.

    Attributes:
        num_items: by kind; in an index of version 2 one number.
    """

    name: str
    num_bytes: int
    sha256: str
    num_samples: int
    num_items: dict[str, int] | int
    table_offset: int
    table_bytes: int
    table_sha256: str


def field(content: Any, name: str, is_right: Callable[[Any], bool]) -> Any:
    """A field of JSON, None if it is missing.

    Raises:
        KeyError: it is not of its form.
    """
    value = content.get(name) if isinstance(content, dict) else None
    if not is_right(value):
        raise KeyError(name)
    return value


def is_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def is_list(value: Any) -> bool:
    """Whether a value is a list."""
    return isinstance(value, list)


def is_sha256(value: Any) -> bool:
    """Whether a value is a SHA-256 in hexadecimal."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_ids_or_none(value: Any) -> bool:
    """Whether a value is a list of numbers and texts, or missing."""
    return value is None or (isinstance(value, list) and all(type(identity) in (int, str) for identity in value))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _is_counts(value: Any) -> bool:
    """Whether this is a count of units: one number in an index of version 2."""
    return _is_count(value) or (isinstance(value, dict) and all(_is_count(value.get(kind)) for kind in COUNTED_KINDS))


def _is_table(value: Any) -> bool:
    return is_list(value) and len(value) == 3 and all(map(_is_count, value[:2])) and is_sha256(value[2])


def _is_file_name(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(os.fsencode(value)) and not set(value) & {"/", "\0"} and value != ".."
    except UnicodeEncodeError:
        return False


def shard_of(entry: Any) -> Shard:
    """A shard's entry in an index.

    Raises:
        KeyError: a field is missing or of another form.
    """
    return Shard(
        field(entry, "name", _is_file_name),
        field(entry, "bytes", _is_count),
        field(entry, "sha256", is_sha256),
        field(entry, "num_samples", _is_count),
        field(entry, "num_items", _is_counts),
        *field(entry, "table", _is_table),
    )
