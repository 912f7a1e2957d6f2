"""Local copies of remote shards, at most so many bytes, shared by all reader processes and ranks of a node.

    FOLDER/SHA256.shard        a complete copy; its modification time is its last use
    FOLDER/SHA256.BYTES.part   an incomplete copy, which counts as the BYTES it will have
    FOLDER/SHA256.lock         locked by the process that fetches this shard; different shards are fetched in parallel
    FOLDER/room.lock           locked for a moment while copies are counted, removed or renamed

Copies are named by their content: no source is mistaken for another one, and no shard that was prepared again for the
old one. The kernel frees a killed process's locks, so a part whose lock is free is a leftover. A file that
another process has open stays readable after its removal, and takes space on the disk until it is closed.

Source: https://py-filelock.readthedocs.io for the locks.
"""

import io
import logging
import math
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from unimo3.data.remote import check_source, join, receive
from unimo3.errors import DataError

log = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COPY_OR_PART = re.compile(r"([0-9a-f]{64})\.(?:shard|(\d+)\.part)")
_WAIT_FOR_ROOM_S = 0.1


class ShardCache:
    """Copies of one source's files in a folder that other sources, processes and runs may share.

    Args:
        source: the URL of a folder, or the path of a mounted one.
        folder: on a local disk of the node; made when first needed.
        limit_bytes: limit of the total size of all copies in `folder`.

    Raises:
        DataError: the source cannot be used.
    """

    def __init__(self, source: str, folder: Path, limit_bytes: int):
        check_source(source)
        self.source = source
        self.folder = folder
        self.limit_bytes = limit_bytes

    def path(self, name: str, num_bytes: int, sha256: str, start: int | None = None) -> Path:
        """The local copy of a file or of a part of it, fetched if it is not there.

        To make room another process may remove the copy as soon as this returns; `open` is safe from that.

        Args:
            name: within the source's folder.
            num_bytes: size by the index; an existing copy of this size is trusted.
            sha256: checksum by the index, which is compared while the file is fetched.
            start: offset of the part that has this size and checksum. None: the complete file has them.

        Raises:
            DataError: the name, the limit, the source's file or the cache's folder cannot be used.
        """
        where = self._where(name)
        if not _SHA256.fullmatch(sha256):
            raise DataError(f"{where}: its index gives {sha256!r} for its sha256; index it again")
        if num_bytes > self.limit_bytes:
            raise DataError(
                f"data.cache_gb: {self.limit_bytes / 1e9:g}: {where} alone has {num_bytes} bytes; set at least "
                f"{math.ceil(num_bytes / 1e6) / 1e3:g}, and as much again for each shard in use"
            )
        copy = self.folder / f"{sha256}.shard"
        try:
            if not _use(copy, num_bytes):
                self.folder.mkdir(parents=True, exist_ok=True)
                with _lock(self.folder / f"{sha256}.lock"):
                    # Another process may have fetched it while this one waited.
                    if not _use(copy, num_bytes):
                        self._fetch(where, copy, num_bytes, sha256, start)
        except OSError as error:
            raise DataError(
                f"{self.folder}: the cache cannot be written ({error.strerror or error}); free space there, lower "
                "data.cache_gb, or name another folder on a local disk"
            ) from error
        return copy

    def open(self, name: str, num_bytes: int, sha256: str, start: int | None = None) -> int:
        """A descriptor of the local copy, to be closed by the caller; arguments and errors as for `path`."""
        while True:
            # Not there: another process removed it between these two calls, to make room.
            with suppress(FileNotFoundError):
                return os.open(self.path(name, num_bytes, sha256, start), os.O_RDONLY)

    def read(self, name: str, limit: int) -> bytes:
        """A small file of the source, which is not cached.

        Args:
            limit: most bytes it may have.

        Raises:
            DataError: it cannot be read or has more.
        """
        where = self._where(name)
        content = io.BytesIO()
        if receive(where, content, limit)[0] > limit:
            raise DataError(f"{where}: has more than {limit} bytes; see whether the source is the right one")
        return content.getvalue()

    def _where(self, name: str) -> str:
        if not name.isprintable() or "/" in name or ".." in name or name in ("", "."):
            raise DataError(
                f"{self.source}: lists a file named {name!r}, which could lie outside it; names have no / and no .., "
                "so rename the file and index it again"
            )
        return join(self.source, name)

    def _fetch(self, where: str, copy: Path, num_bytes: int, sha256: str, start: int | None) -> None:
        """Fetch and check a copy, then rename it to `copy`; the caller has the shard's lock."""
        wanted = None if start is None else range(start, start + num_bytes)
        started = time.monotonic()
        part = self.folder / f"{sha256}.{num_bytes}.part"
        while not self._make_room(part, sha256, num_bytes):
            time.sleep(_WAIT_FOR_ROOM_S)  # until a fetch elsewhere ends, or its process
        try:
            with part.open("wb") as file:
                received = receive(where, file, num_bytes, wanted)
                if received != (num_bytes, sha256):
                    log.warning("%s: came with another size or checksum than was indexed; fetching it again", where)
                    received = receive(where, file, num_bytes, wanted)
            if received != (num_bytes, sha256):
                size = f"more than {num_bytes}" if received[0] > num_bytes else str(received[0])
                raise DataError(
                    f"{where}: the source's file is not the one that was indexed: {size} bytes, sha256 {received[1]}, "
                    f"its index has {num_bytes} and {sha256}; copy the folder there again, or index it again"
                )
            # Under the lock: whoever counts sees either the part or the copy.
            with _lock(self.folder / "room.lock"):
                part.replace(copy)
        finally:
            part.unlink(missing_ok=True)
        log.info("fetched %s: %.1f MB in %.1f s", where, num_bytes / 1e6, time.monotonic() - started)

    def _make_room(self, part: Path, sha256: str, num_bytes: int) -> bool:
        """Remove copies until there is room for `part` and create it; false if running fetches leave no room for it."""
        with _lock(self.folder / "room.lock"):
            copies = []
            coming = num_bytes
            for path in self.folder.iterdir():
                match = _COPY_OR_PART.fullmatch(path.name)
                if match is None:
                    continue  # a lock, or a file of another program
                shard, announced = match.groups()
                if announced is None:
                    with suppress(FileNotFoundError):
                        status = path.stat()
                        copies.append((status.st_mtime_ns, status.st_size, path))
                # The part's lock may be released after this test: a part is created only under room.lock.
                elif shard == sha256 or _is_free(self.folder / f"{shard}.lock"):
                    path.unlink(missing_ok=True)
                else:
                    coming += int(announced)
            if coming > self.limit_bytes:
                return False
            excess = coming + sum(size for _, size, _ in copies) - self.limit_bytes
            for _, size, path in sorted(copies):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= size
            part.touch()
            return True


def _use(copy: Path, num_bytes: int) -> bool:
    """Whether a complete copy is there; it then counts as the most recently used."""
    try:
        if copy.stat().st_size != num_bytes:
            return False
        os.utime(copy)
    except FileNotFoundError:
        return False
    return True


def _lock(path: Path) -> FileLock:
    # Without the fallback: a soft lock would outlive a killed process.
    return FileLock(path, fallback_to_soft=False, poll_interval=0.02)


def _is_free(path: Path) -> bool:
    try:
        with _lock(path).acquire(blocking=False):
            return True
    except Timeout:
        return False
