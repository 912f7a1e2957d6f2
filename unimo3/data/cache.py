"""Local copies of remote shards, at most so many bytes, shared by all reader processes and ranks of a node.

    FOLDER/SHA256.shard        a whole copy; its modification time is its last use
    FOLDER/SHA256.BYTES.part   a copy on its way, which counts as the BYTES it will have
    FOLDER/SHA256.lock         held by the process that fetches this shard, so different shards come side by side
    FOLDER/room.lock           held for a moment while copies are counted, removed or put in place

Copies are named by their content: no source can be taken for another one, and shards that were prepared again are not
taken for the old ones. The kernel frees a killed process's locks, so a part whose lock is free is a leftover. What
another process has open stays readable after it was removed, and keeps its place on the disk until it is closed.

Source: RFC 9110, section 15, for the statuses worth another try; https://py-filelock.readthedocs.io for the locks.
"""

import hashlib
import http.client
import io
import logging
import math
import os
import re
import ssl
import time
import urllib.request
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import quote

from filelock import FileLock, Timeout

from unimo3.errors import DataError

log = logging.getLogger(__name__)

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_LABEL = r"[A-Za-z0-9_-]{1,63}"
# A host, a port, and a path of visible ASCII: no user, query or fragment.
_ADDRESS = re.compile(rf"(?i:https)://({_LABEL}(\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(:\d{{1,5}})?(/[!\"$->@-~]*)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COPY_OR_PART = re.compile(r"([0-9a-f]{64})\.(?:shard|(\d+)\.part)")
_TIMEOUT_S = 30.0
_PAUSES_S = (1.0, 3.0, 10.0, 30.0)
_WAIT_FOR_ROOM_S = 0.1
_CHUNK_BYTES = 2**20

_REASONS = {
    "pipe": "runs a shell, so whoever names a source could run anything",
    "http": "lets anybody on the way read and change what is sent",
}
_LOGIN = "this program sends no login: let the folder be read without one, or mount it"
_MENDS = {401: _LOGIN, 403: _LOGIN, 404: "mend the source's address, or copy its folder there whole"}


class _PassingError(Exception):
    """What another try may not meet."""


def is_remote(source: str) -> bool:
    """Whether a source is an ``https:`` URL."""
    return _scheme(source) == "https"


def check_source(source: str) -> None:
    """Accept a path or an ``https:`` URL of a folder; nothing is looked up.

    Raises:
        DataError: the source has another scheme, or its URL has more than a host, a port and a path.
    """
    scheme = _scheme(source)
    if scheme not in ("", "https"):
        reason = _REASONS.get(scheme, "is not read by this program")
        raise DataError(
            f"{_without_secrets(source)}: {scheme}: {reason}; name an https: URL, or a folder where the storage is "
            "mounted (./ before a path with a colon)"
        )
    if scheme and not _ADDRESS.fullmatch(source):
        raise DataError(
            f"{_without_secrets(source)}: is no URL of a folder; name it as https://HOST/FOLDER, without user, query "
            "or fragment and with percent signs for unusual characters"
        )


class ShardCache:
    """Copies of one source's files in a folder that other sources, processes and runs may share.

    Args:
        source: the ``https:`` URL of a folder, or the path of a mounted one.
        folder: on a disk of the node's own; made when first needed.
        limit_bytes: most that all copies in `folder` may take.

    Raises:
        DataError: the source cannot be used.
    """

    def __init__(self, source: str, folder: Path, limit_bytes: int):
        check_source(source)
        self.source = source
        self.folder = folder
        self.limit_bytes = limit_bytes

    def path(self, name: str, num_bytes: int, sha256: str) -> Path:
        """The local copy of a file, fetched if it is not there.

        To make room another process may remove the copy as soon as this returns; `open` is safe from that.

        Args:
            name: within the source's folder.
            num_bytes: size by the index; a copy in place is trusted if it has it.
            sha256: checksum by the index, which is compared while the file comes.

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
                        self._fetch(where, copy, num_bytes, sha256)
        except OSError as error:
            raise DataError(
                f"{self.folder}: the cache cannot be written ({error.strerror or error}); free space there, lower "
                "data.cache_gb, or name another folder on a local disk"
            ) from error
        return copy

    def open(self, name: str, num_bytes: int, sha256: str) -> int:
        """A descriptor of the local copy, to be closed by the caller; arguments and errors as for `path`."""
        while True:
            # Not there: another process removed it between these two calls, to make room.
            with suppress(FileNotFoundError):
                return os.open(self.path(name, num_bytes, sha256), os.O_RDONLY)

    def read(self, name: str, limit: int) -> bytes:
        """A small file of the source, which is not kept.

        Args:
            limit: most bytes it may have.

        Raises:
            DataError: it cannot be read or has more.
        """
        where = self._where(name)
        content = io.BytesIO()
        if self._receive(where, content, limit)[0] > limit:
            raise DataError(f"{where}: has more than {limit} bytes; see whether the source is the right one")
        return content.getvalue()

    def _where(self, name: str) -> str:
        if not name.isprintable() or "/" in name or ".." in name or name in ("", "."):
            raise DataError(
                f"{self.source}: lists a file named {name!r}, which could lie outside it; names have no / and no .., "
                "so rename the file and index it again"
            )
        return f"{self.source.rstrip('/')}/{quote(name) if is_remote(self.source) else name}"

    def _fetch(self, where: str, copy: Path, num_bytes: int, sha256: str) -> None:
        """Put a checked copy in place; the caller holds the shard's lock."""
        started = time.monotonic()
        part = self.folder / f"{sha256}.{num_bytes}.part"
        while not self._make_room(part, sha256, num_bytes):
            time.sleep(_WAIT_FOR_ROOM_S)  # until a fetch elsewhere ends, or its process
        try:
            with part.open("wb") as file:
                found = self._receive(where, file, num_bytes)
                if found != (num_bytes, sha256):
                    log.warning("%s: came with another size or checksum than was indexed; fetching it again", where)
                    found = self._receive(where, file, num_bytes)
            if found != (num_bytes, sha256):
                size = f"more than {num_bytes}" if found[0] > num_bytes else str(found[0])
                raise DataError(
                    f"{where}: the source's file is not the one that was indexed: {size} bytes, sha256 {found[1]}, "
                    f"its index says {num_bytes} and {sha256}; copy the folder there again, or index it again"
                )
            # Under the lock: whoever counts sees either the part or the copy.
            with _lock(self.folder / "room.lock"):
                part.replace(copy)
        finally:
            part.unlink(missing_ok=True)
        log.info("fetched %s: %.1f MB in %.1f s", where, num_bytes / 1e6, time.monotonic() - started)

    def _make_room(self, part: Path, sha256: str, num_bytes: int) -> bool:
        """Announce `part` after removing what it needs removed; or say that fetches under way leave no room for it."""
        with _lock(self.folder / "room.lock"):
            copies = []
            coming = num_bytes
            for path in self.folder.iterdir():
                match = _COPY_OR_PART.fullmatch(path.name)
                if match is None:
                    continue  # a lock, or a file that is none of ours
                shard, announced = match.groups()
                if announced is None:
                    with suppress(FileNotFoundError):
                        status = path.stat()
                        copies.append((status.st_mtime_ns, status.st_size, path))
                # The lock need not be kept for this: a part is begun under the lock held here.
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

    def _receive(self, where: str, file: BinaryIO, limit: int) -> tuple[int, str]:
        """Write a source's file to `file`, from the start at each try; return its size and sha256.

        Past `limit` bytes the rest is left, and the size returned is above `limit`.
        """
        for pause_s in (*_PAUSES_S, None):
            file.seek(0)
            file.truncate()
            size, digest = 0, hashlib.sha256()
            try:
                with closing(_read_url(where) if is_remote(where) else _read_file(Path(where))) as chunks:
                    for chunk in chunks:
                        size += len(chunk)
                        if size > limit:
                            break
                        file.write(chunk)
                        digest.update(chunk)
                return size, digest.hexdigest()
            except _PassingError as error:
                if pause_s is None:
                    raise DataError(
                        f"{where}: {error}, at the last of {1 + len(_PAUSES_S)} tries; see whether its server or "
                        "mount works, then start again"
                    ) from error
                log.warning("%s: %s; trying again in %g s", where, error, pause_s)
                time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not is_remote(newurl):
            raise DataError(
                f"{req.full_url}: the server redirects to {_without_secrets(newurl)}; only https: is followed, so name "
                "the folder's final https: URL"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read_url(url: str) -> Generator[bytes, None, None]:
    # Made anew each time, so that it trusts what SSL_CERT_FILE names now.
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=ssl.create_default_context()), _HttpsRedirects
    )
    # What the caller does with a chunk raises outside of this try.
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as response:
            while chunk := response.read(_CHUNK_BYTES):
                yield chunk
            if response.length:  # what Content-Length announced and read() does not miss
                raise _PassingError(f"the connection ended {response.length} bytes early")
    except HTTPError as error:
        error.close()
        answer = f"the server answers {error.code} {error.reason}"
        if error.code in (408, 429) or error.code >= 500:
            raise _PassingError(answer) from error
        raise DataError(f"{url}: {answer}; {_MENDS.get(error.code, _MENDS[404])}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DataError(
                f"{url}: the server's certificate is not trusted ({reason.verify_message}); let SSL_CERT_FILE name a "
                "file with the authority's certificate"
            ) from error
        raise _PassingError(f"no answer, or half of one ({reason or type(reason).__name__})") from error


def _read_file(path: Path) -> Generator[bytes, None, None]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); mount its folder with all of its files, readable"
        ) from error
    except OSError as error:  # of a network file system, which may come back
        raise _PassingError(f"cannot be read ({error.strerror})") from error


def _use(copy: Path, num_bytes: int) -> bool:
    """Whether a whole copy is there; it then counts as the most recently used."""
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


def _scheme(source: str) -> str:
    match = _SCHEME.match(source)
    return match[1].lower() if match else ""


def _without_secrets(source: str) -> str:
    return re.sub(r"(?<=//)[^/]*@|[?#].*", "...", source)
