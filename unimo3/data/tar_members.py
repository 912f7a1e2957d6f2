"""The members of a tar in their order, or of several tars that were joined to one file.

Source: the tar format of POSIX.1-1988; GNU tar's --ignore-zeros for joined tars.
"""

import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from unimo3.errors import DataError

_BLOCK_BYTES = 512
_READ_BYTES = 2**20


def tar_members(path: Path) -> Iterator[tuple[BinaryIO, int, tarfile.TarInfo]]:
    """The open file to read contents from, the number of the joined tar, and a member of it.

    Raises:
        DataError: the file is no tar that can be read from its beginning to its end.
    """
    try:
        with path.open("rb") as file:
            for part, member in _members_from(file, 0):
                yield file, part, member
    except (MemoryError, DataError):
        raise
    except Exception as error:  # Python's reader meets damage with errors of many kinds
        raise DataError(f"{path}: is no readable tar ({error}); make or copy it again") from error


def another_tar_follows(file: BinaryIO, position: int) -> bool:
    """Whether members of another tar follow the one in which a header or the end is at `position`."""
    try:
        return any(part for part, _ in _members_from(file, position))
    except MemoryError:
        raise
    except Exception:  # damage, which Python's reader meets with errors of many kinds
        return False


def _members_from(file: BinaryIO, start: int | None) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """Each member from offset `start` on, after the number of its tar."""
    num_members = 0
    for part in itertools.count():
        if start is None:
            return
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            end = start
            while (member := tar.next()) is not None:
                if tar.offset < member.offset_data:
                    raise tarfile.ReadError(f"the size of {member.name!r} is below 0")
                end = tar.offset
                num_members += 1
                yield part, member
        start = _next_start(file, end, num_members)


def _next_start(file: BinaryIO, end: int, num_members: int) -> int | None:
    """Offset of the tar that is joined to one which ends at `end`; None if there is none.

    Raises:
        tarfile.ReadError: the file is cut off or damaged at `end`, or something else than a tar follows.
    """
    file.seek(end)
    # A tar ends in blocks of zeros. Python's reader accepts any end between two members.
    block = file.read(_BLOCK_BYTES)
    if len(block) < _BLOCK_BYTES:
        raise tarfile.ReadError(f"it is cut off after {num_members} members")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"it is damaged after {num_members} members: none begins at byte {end}")
    offset = end + _BLOCK_BYTES
    while content := file.read(_READ_BYTES):
        if rest := content.lstrip(b"\0"):
            offset += len(content) - len(rest)
            break
        offset += len(content)
    else:
        return None
    start = offset - offset % _BLOCK_BYTES
    file.seek(start)
    try:
        tarfile.TarInfo.frombuf(file.read(_BLOCK_BYTES), "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        num_bytes = file.seek(0, os.SEEK_END) - offset
        raise tarfile.ReadError(f"{num_bytes} bytes after its end are no tar") from error
    return start
