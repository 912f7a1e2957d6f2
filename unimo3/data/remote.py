"""Files of a source, which is a URL or a mounted folder: what is accepted, and reading with retries.

Of URLs, ``https:`` is spoken here, without a login, and redirects stay within it; `unimo3.object_store` reads those of
object stores. What may pass (a busy server, a connection that ended early, a network file system that is away) is tried
again, from the start of the file or, of an object, from the range that failed; what another try cannot fix is refused
at once.

Source: RFC 9110, section 15, for the statuses worth another try.
"""

import hashlib
import http.client
import logging
import re
import ssl
import sys
import time
import urllib.request
from collections.abc import Generator
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import quote

from unimo3 import object_store
from unimo3.errors import DataError, UnreachableError
from unimo3.object_store import ObjectChangedError, StoreError
from unimo3.object_store import without_secrets as _without_secrets

log = logging.getLogger(__name__)

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_LABEL = r"[A-Za-z0-9_-]{1,63}"
# A host, a port, and a path of visible ASCII: no user, query or fragment.
_URL = re.compile(rf"(?i:https)://({_LABEL}(\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(:\d{{1,5}})?(/[!\"$->@-~]*)?")
_TIMEOUT_S = 30.0
_PAUSES_S = object_store.PAUSES_S
_CHUNK_BYTES = 2**20

_REASONS = {
    "pipe": "runs a shell, so whoever names a source could run anything",
    "http": "lets anybody on the way read and change what is sent",
}
_LOGIN = "this program sends no login: let the folder be read without one, or mount it"
_HINTS = {401: _LOGIN, 403: _LOGIN, 404: "fix the source's URL, or copy its complete folder there"}


class _PassingError(Exception):
    """What another try may not meet."""


def is_remote(source: str) -> bool:
    """Whether a source is an ``https:`` URL or that of an object store."""
    return _scheme(source) == "https" or object_store.is_store(source)


def join(source: str, name: str) -> str:
    """The address of a source's file."""
    return f"{source.rstrip('/')}/{quote(name) if _scheme(source) == 'https' else name}"


def check_source(source: str) -> None:
    """Accept a path, or the URL of a folder at an ``https:`` server or in an object store; nothing is looked up.

    Raises:
        DataError: the source has another scheme, or its URL has more than a host or bucket, a port and a path.
    """
    if object_store.is_store(source):
        try:
            object_store.check_url(source)
        except StoreError as error:
            raise DataError(str(error)) from error
        return
    scheme = _scheme(source)
    if scheme not in ("", "https"):
        reason = _REASONS.get(scheme, "is not read by this program")
        raise DataError(
            f"{_without_secrets(source)}: {scheme}: {reason}; name an https: URL, or a folder where the storage is "
            "mounted (./ before a path with a colon)"
        )
    if scheme and not _URL.fullmatch(source):
        raise DataError(
            f"{_without_secrets(source)}: is no URL of a folder; name it as https://HOST/FOLDER, without user, query "
            "or fragment and with percent signs for unusual characters"
        )


def receive(where: str, file: BinaryIO, limit: int, part: range | None = None) -> tuple[int, str]:
    """Write a source's file to `file`, from the start at each try.

    Args:
        where: a URL or a path.
        file: is emptied first.
        limit: most bytes wanted; the rest is not read.
        part: the bytes of the source's file that are wanted. None: all.

    Returns:
        The size in bytes, above `limit` if the file is larger, and the sha256 of what was written.

    Raises:
        DataError: it cannot be read, at once or after the last try.
    """
    for pause_s in (*_PAUSES_S, None):
        file.seek(0)
        file.truncate()
        size, digest = 0, hashlib.sha256()
        try:
            with closing(_read(where, part)) as chunks:
                for chunk in chunks:
                    size += len(chunk)
                    if size > limit:
                        break
                    file.write(chunk)
                    digest.update(chunk)
            return size, digest.hexdigest()
        except _PassingError as error:
            if pause_s is None:
                raise UnreachableError(
                    f"{where}: {error}, at the last of {1 + len(_PAUSES_S)} tries; see whether its server or "
                    "mount works, then start again"
                ) from error
            log.warning("%s: %s; trying again in %g s", where, error, pause_s)
            time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


def _read(where: str, part: range | None) -> Generator[bytes, None, None]:
    if object_store.is_store(where):
        return _read_object(where, part)
    return _read_url(where, part) if is_remote(where) else _read_file(Path(where), part)


def _read_object(url: str, part: range | None) -> Generator[bytes, None, None]:
    # Expired credentials end a run with status 78, which holds its job: a start without fresh ones would fail again.
    try:
        yield from object_store.read(url, part=part)
    except ObjectChangedError as error:
        raise _PassingError(str(error).removeprefix(f"{url}: ")) from error
    except StoreError as error:
        raise DataError(str(error)) from error


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if _scheme(newurl) != "https":
            raise DataError(
                f"{req.full_url}: the server redirects to {_without_secrets(newurl)}; only https: is followed, so name "
                "the folder's final https: URL"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read_url(url: str, part: range | None) -> Generator[bytes, None, None]:
    # Made again each time, so that it trusts what SSL_CERT_FILE names now.
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=ssl.create_default_context()), _HttpsRedirects
    )
    request = urllib.request.Request(url)
    if part is not None:
        request.add_header("Range", f"bytes={part.start}-{part.stop - 1}")
    # What the caller does with a chunk raises outside of this try.
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            # A server without ranges sends all, of which the rest is not read.
            has_rest = part is not None and response.status != HTTPStatus.PARTIAL_CONTENT
            yield from _chunks(response, part.start if part is not None and has_rest else 0, part)
            if response.length and not has_rest:  # what Content-Length announced and read() does not miss
                raise _PassingError(f"the connection ended {response.length} bytes early")
    except HTTPError as error:
        error.close()
        answer = f"the server answers {error.code} {error.reason}"
        if error.code in (408, 429) or error.code >= 500:
            raise _PassingError(answer) from error
        raise DataError(f"{url}: {answer}; {_HINTS.get(error.code, _HINTS[404])}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DataError(
                f"{url}: the server's certificate is not trusted ({reason.verify_message}); let SSL_CERT_FILE name a "
                "file with the authority's certificate"
            ) from error
        raise _PassingError(f"no answer, or half of one ({reason or type(reason).__name__})") from error


def _chunks(file: Any, skipped: int, part: range | None) -> Generator[bytes, None, None]:
    """The content of what can be read, after some bytes, and no more than a part has."""
    while skipped and (chunk := file.read(min(_CHUNK_BYTES, skipped))):
        skipped -= len(chunk)
    left = sys.maxsize if part is None else len(part)
    while left and (chunk := file.read(min(_CHUNK_BYTES, left))):
        left -= len(chunk)
        yield chunk


def _read_file(path: Path, part: range | None) -> Generator[bytes, None, None]:
    try:
        with path.open("rb") as file:
            file.seek(0 if part is None else part.start)
            yield from _chunks(file, 0, part)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); mount its folder with all of its files, readable"
        ) from error
    except OSError as error:  # of a network file system, which may come back
        raise _PassingError(f"cannot be read ({error.strerror})") from error


def _scheme(source: str) -> str:
    match = _SCHEME.match(source)
    return match[1].lower() if match else ""
