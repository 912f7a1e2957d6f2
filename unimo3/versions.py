"""Versions of the files that programs write and read again; a file without one is of version 1.

A checkpoint, a run's settings, an index, an exported folder and a line of a log have one each. A new version is needed
where a program that does not know it would read the file wrongly; fields that may be ignored need none.

Source: none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimo3.errors import ConfigError, Unimo3Error

UPDATE = "update this program to the version that wrote it"


def check_version(
    path: Path | str,
    content: Any,
    readable: Sequence[int] = (1,),
    fix: str = UPDATE,
    kind: type[Unimo3Error] = ConfigError,
) -> None:
    """Refuse content of a version that this program does not read.

    Args:
        fix: what to do with another version.

    Raises:
        ConfigError: or the given kind of error.
    """
    version = content.get("version", 1) if isinstance(content, dict) else 1
    if version not in readable:
        versions = ", ".join(map(str, readable))
        raise kind(f"{path}: version {version!r}, this program reads {versions}; {fix}")
