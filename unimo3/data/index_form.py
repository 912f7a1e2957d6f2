"""The form of an ``index.json``: what its fields may be, and its shards' entries, which it had up to version 3.

Source: none.
"""

import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from unimo3.data.members import COUNTED_KINDS
from unimo3.data.shard_records import MAX_COUNT, Shard, records_of


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


def is_count(value: Any) -> bool:
    """Whether a value is a size or a number of things."""
    return type(value) is int and 0 <= value <= MAX_COUNT


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(is_count(value.get(kind)) for kind in COUNTED_KINDS)


def _is_table(value: Any) -> bool:
    return is_list(value) and len(value) == 3 and all(map(is_count, value[:2])) and is_sha256(value[2])


def _is_file_name(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(os.fsencode(value)) and not set(value) & {"/", "\0"} and value != ".."
    except UnicodeEncodeError:
        return False


def records_of_entries(content: Any) -> np.ndarray:
    """The records of the shards that an index of version 2 or 3 lists.

    Raises:
        KeyError: a field is missing or of another form.
    """
    counts_kinds = content["version"] > 2
    shards = [_shard_of(entry, counts_kinds) for entry in field(content, "shards", is_list)]
    return records_of(shards, counts_kinds)


def _shard_of(entry: Any, counts_kinds: bool) -> Shard:
    return Shard(
        field(entry, "name", _is_file_name),
        field(entry, "bytes", is_count),
        field(entry, "sha256", is_sha256),
        field(entry, "num_samples", is_count),
        field(entry, "num_items", _is_counts if counts_kinds else is_count),
        *field(entry, "table", _is_table),
    )
