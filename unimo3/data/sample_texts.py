"""The texts of a sample: what its ``json`` and its ``txt`` member contain.

Source: RFC 8259 (JSON); the Unicode Standard, section 23.8, for byte order marks.
"""

import codecs
import json
import re
from typing import Any

from unimo3.texts import is_blank

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# The field of an item that is its text.
_TEXT_OF_ITEM = {"questions": "question", "hypotheses": "text", "choices": "text"}
_LINE_END = re.compile(r"\r\n|\r|\n")


class BadSampleError(Exception):
    """A sample cannot be used; the message is the reason, without the sample's key."""


def content_of(members: dict[str, bytes]) -> dict[str, Any]:
    """The content of a sample's ``json``; empty if the sample has a ``txt`` alone.

    Raises:
        BadSampleError: it has no text that could be read.
    """
    if "json" not in members and "txt" not in members:
        raise BadSampleError("has no json member and no txt member")
    try:
        content = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"its json cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise BadSampleError(f"its json is a {type(content).__name__}; an object is needed")
    return content


def captions_of(members: dict[str, bytes], content: dict[str, Any]) -> list[str]:
    """A sample's texts: of its ``captions``, else its ``caption``, else the lines of its ``txt`` member.

    The first of them that has a text counts. What is blank or no text is skipped.

    Raises:
        BadSampleError: the ``txt`` member counts, and its encoding is unknown.
    """
    for name in ("captions", "caption"):
        values = content.get(name)
        if texts := _usable(values if isinstance(values, list) else [values]):
            return texts
    return _usable(_LINE_END.split(_decode(members.get("txt", b""))))


def lack_of(kind: str, members: dict[str, bytes]) -> str:
    """Why a sample has no `kind` (``captions``, ``questions`` and so on); empty if it has."""
    try:
        content = content_of(members)
        has_kind = bool(captions_of(members, content) if kind == "captions" else content.get(kind))
    except BadSampleError as error:
        return str(error)
    return "" if has_kind else f"has no {kind}"


def texts_of(kind: str, members: dict[str, bytes]) -> list[str]:
    """All texts that a sample has of a `kind` (``captions``, ``questions`` and so on); none of a bad sample."""
    try:
        content = content_of(members)
        if kind == "captions":
            return captions_of(members, content)
    except BadSampleError:
        return []
    if kind not in _TEXT_OF_ITEM:
        return _usable([content.get(kind)])
    items = content.get(kind)
    return _usable([item.get(_TEXT_OF_ITEM[kind]) for item in _objects(items)])


def _objects(items: Any) -> list[dict[str, Any]]:
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def answers_of(members: dict[str, bytes]) -> list[list[str]]:
    """The human answers to each of a sample's questions; none of a bad sample."""
    try:
        questions = _objects(content_of(members).get("questions"))
    except BadSampleError:
        return []
    human = [question.get("answers") for question in questions]
    return [[text for text in texts if isinstance(text, str)] if isinstance(texts, list) else [] for texts in human]


def _usable(values: list[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str) and not is_blank(value)]


def _decode(content: bytes) -> str:
    """A text file's content: UTF-8, or UTF-16 or UTF-32 with a byte order mark."""
    encoding = next((name for mark, name in _ENCODINGS.items() if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadSampleError(f"its txt cannot be read ({error}); write it as UTF-8") from error
    if "\0" in text:
        raise BadSampleError("its txt has zero bytes, as UTF-16 without a byte order mark has; write it as UTF-8")
    return text
