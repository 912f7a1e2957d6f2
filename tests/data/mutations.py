"""Damaged and odd inputs for property tests, and what a program makes of them."""

import contextlib
import io
import logging
from copy import deepcopy
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.data.conftest import convert

# The same examples in every run; a failing one is printed as it is.
property_settings = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

TEXTS = [
    "a dog",
    "",
    " ",
    "\ud83d",
    "\udc36 b",
    "\ufeffa dog",
    "a\0b",
    "two\nlines",
    "déjà 犬 🚲",
    "x" * 300,
    "../../a",
    "5",
]


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


JUNK = st.sampled_from(
    [None, True, 0, -1, 2**63, 10**40, 1.5, float("nan"), [], {}, [None], {"a": [1]}, deep(500), *TEXTS]
)


def paths_in(content: Any) -> list[tuple[Any, ...]]:
    """The paths of all values of a JSON value, itself first."""
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [(), *((name, *path) for name, value in entries for path in paths_in(value))]


@st.composite
def mutated(draw: Any, content: Any) -> Any:
    """A JSON value with one entry replaced, removed or repeated."""
    content = deepcopy(content)
    path = draw(st.sampled_from(paths_in(content)))
    if not path:
        return draw(JUNK)
    parent = content
    for step in path[:-1]:
        parent = parent[step]
    how = draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
    if how == "remove":
        del parent[path[-1]]
    elif how == "repeat" and isinstance(parent, list):
        parent.append(deepcopy(parent[path[-1]]))
    else:
        parent[path[-1]] = draw(JUNK)
    return content


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """Bytes that are cut off, changed, lengthened or replaced."""
    how = draw(st.sampled_from(["cut", "change", "append", "insert", "empty", "noise"]))
    position = draw(st.integers(0, max(len(content) - 1, 0)))
    if how == "cut":
        return content[:position]
    if how == "change":
        changed = bytearray(content)
        changed[position : position + 1] = draw(st.binary(min_size=1, max_size=4))
        return bytes(changed[: len(content)])
    if how == "append":
        return content + draw(st.sampled_from([b"x", bytes(700), b"y" * 512, content, content[: len(content) // 2]]))
    if how == "insert":
        return content[:position] + draw(st.sampled_from([b"x", bytes(512), b"y" * 512])) + content[position:]
    return b"" if how == "empty" else draw(st.binary(max_size=2000))


def result_of(*arguments: str) -> tuple[int, str]:
    """Status and stderr of prepare_shards, whose failures are one message with status 78."""
    stderr = io.StringIO()
    handler = logging.StreamHandler(stderr)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            status = convert(*arguments)
    finally:
        logging.getLogger().removeHandler(handler)
    error = stderr.getvalue()
    assert status in (0, 78), error
    assert "Traceback" not in error
    if status:
        assert error.count("DataError: ") + error.count("ConfigError: ") == 1, error
    return status, error
