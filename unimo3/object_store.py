"""Objects of a store, such as ``s3://BUCKET/PATH``: reading in ranges, listing, writing, with retries and clear errors.

fsspec and the store's own package are imported when an object is first used. Endpoint and credentials come from the
store's own environment variables and files, never from a URL. What may pass (throttling, a timeout, a connection that
ended early) is tried again; of a large object, only the range that failed.

Source: https://filesystem-spec.readthedocs.io for the calls, and its section on forked processes;
https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html for the codes.
"""

import functools
import itertools
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from unimo3.errors import Unimo3Error, UnreachableError
from unimo3.object_etag import PART_BYTES, etag_of, is_encrypted_by_key, part_bytes_of
from unimo3.object_store_errors import is_expired, permanent_problem, plain_message, status_of

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Seconds between two tries.
PAUSES_S = (1.0, 3.0, 10.0, 30.0)
CHUNK_BYTES = 16 * 2**20
_TRIES_OF_A_PART = 5
_TIMEOUT_S = 30.0

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# A bucket or container, and a path whose parts are not empty: no user, query, fragment or chain of URLs.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9._-]+(/(?!\.{1,2}(/|$))[^/?#\\]+)*/?")
# Schemes of fsspec's that name local files, wrap another file system, or send what they read in the clear.
_NOT_STORES = frozenset(
    "async_wrapper asynclocal asyncwrapper blockcache cached dask data dir file filecache ftp generic git http https "
    "jlab jupyter libarchive local memory pipe pyscript reference simplecache tar zip".split()
)
# What identifies a version of an object, by the names of the stores' packages; the first that is there.
_IDENTITIES = ("ETag", "etag", "generation", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime")

# The file systems in use, by process, bucket and tries of a request. A forked process cannot use its parent's, and must
# not close them either, since their sockets are watched through an epoll instance that both share: the entries of the
# parent stay.
_open: dict[tuple[int, str, int], Any] = {}


class StoreError(Unimo3Error):
    """An object or a store cannot be used, and another try cannot change that."""


class ObjectChangedError(Exception):
    """An object was replaced while it was read."""


class StoredObject(NamedTuple):
    """What a store lists of an object.

    Attributes:
        identity: changes with the content, such as an ETag; empty where the store has none.
    """

    num_bytes: int
    identity: str


def is_store(source: str) -> bool:
    """Whether a source is the URL of an object store; `check_url` tests the rest."""
    match = _SCHEME.match(source)
    return match is not None and match[1].lower() not in _NOT_STORES


def check_url(url: str) -> None:
    """Accept the URL of an object or of a prefix; nothing is looked up.

    Raises:
        StoreError: fsspec does not know its scheme, or it has more than a bucket and a path.
    """
    import fsspec

    scheme = url.partition("://")[0]  # fsspec knows small letters
    if scheme not in {*fsspec.available_protocols(), *fsspec.registry}:
        raise StoreError(
            f"{without_secrets(url)}: {scheme}: is not read by this program; name a URL of an object store that "
            "fsspec knows, such as s3://BUCKET/PATH, an https: URL, or a folder"
        )
    if not _ADDRESS.fullmatch(url) or not url.isprintable() or "::" in url:
        raise StoreError(
            f"{without_secrets(url)}: is no URL of an object store; name it as {scheme}://BUCKET/PATH, without user, "
            "query or fragment; credentials and endpoint come from the store's own environment or files"
        )


def without_secrets(url: str) -> str:
    """A URL without its user, password, query and fragment."""
    return re.sub(r"(?<=//)([^/]*|[^/]*:(?!\d+/).*)@|[?#].*", "...", url, flags=re.DOTALL)


def join(url: str, name: str) -> str:
    """The URL of an object below a prefix."""
    return f"{url.rstrip('/')}/{name}"


def staging_folder(url: str) -> Path:
    """Where, below the current folder, what is to be sent to a prefix is made by default."""
    return Path("staging", *(part for part in url.partition("://")[2].split("/") if part))


def read(
    url: str, chunk_bytes: int = CHUNK_BYTES, num_parallel: int = 1, part: range | None = None
) -> Generator[bytes, None, None]:
    """An object's content in order; each range is requested by itself and, if that fails, again.

    Args:
        chunk_bytes: of a range.
        num_parallel: ranges requested at a time, and at most in memory.
        part: the bytes that are wanted. None: all.

    Raises:
        ObjectChangedError: it was replaced after the first range was read.
        StoreError: it cannot be read.
        UnreachableError: the store did not answer at the last try.
    """
    first = look_up(url)
    wanted = range(first.num_bytes) if part is None else range(part.start, min(part.stop, first.num_bytes))
    starts = range(wanted.start, wanted.stop, chunk_bytes)

    def fetch(start: int) -> bytes:
        end = min(start + chunk_bytes, wanted.stop)
        return _retry(url, functools.partial(_range, start=start, end=end, expected=first))

    if num_parallel == 1 or len(starts) < 2:
        yield from map(fetch, starts)
    else:
        yield from _in_parallel(fetch, starts, num_parallel)
    # A single request is answered from one version.
    if len(starts) > 1 and look_up(url) != first:
        raise ObjectChangedError(f"{url}: was replaced while it was read")


def _in_parallel(fetch: Callable[[int], bytes], starts: range, num_parallel: int) -> Generator[bytes, None, None]:
    """What `fetch` returns of each start, in order."""
    ahead: deque[Future[bytes]] = deque()
    pool = ThreadPoolExecutor(num_parallel)
    try:
        for start in starts:
            ahead.append(pool.submit(fetch, start))
            if len(ahead) == num_parallel:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def look_up(url: str) -> StoredObject:
    """Size and version of an object.

    Raises:
        StoreError: there is none, or the store refuses.
        UnreachableError: the store did not answer at the last try.
    """
    return _retry(url, _look_up)


def list_objects(url: str) -> dict[str, StoredObject]:
    """The objects below a prefix, by their names relative to it.

    Raises:
        StoreError: the bucket does not exist, or the store refuses.
        UnreachableError: the store did not answer at the last try.
    """

    def find(store: Any, path: str) -> dict[str, StoredObject]:
        entries = store.find(path, detail=True)
        start = path.rstrip("/") + "/"
        return {name[len(start) :]: _stored(info) for name, info in entries.items() if name.startswith(start)}

    return _retry(url, find)


def put_file(path: Path, url: str) -> StoredObject:
    """Write a file as an object, which is there completely or not at all, and compare the store's checksum.

    Raises:
        OSError: the file cannot be read.
        StoreError: the store refuses.
        UnreachableError: the store did not answer at the last try, or its object is not the file.
    """
    with path.open("rb") as file:  # else its errors would be taken for the store's
        num_bytes = os.fstat(file.fileno()).st_size
        part_bytes = part_bytes_of(num_bytes)
        etag = etag_of(iter(lambda: file.read(CHUNK_BYTES), b""), num_bytes, part_bytes) if _is_s3(url) else ""

    def put(store: Any, where: str) -> StoredObject:
        store.put_file(str(path), where, **({"chunksize": part_bytes} if _is_s3(url) else {}))
        return _checked(store, where, num_bytes, part_bytes, etag)

    # One part that fails must not send a hundred others again.
    return _retry(url, put, _TRIES_OF_A_PART if num_bytes >= 2 * part_bytes else 1)


def put_bytes(content: bytes, url: str) -> StoredObject:
    """Write an object; errors as for `put_file`."""
    etag = etag_of([content], len(content), PART_BYTES) if _is_s3(url) else ""

    def put(store: Any, where: str) -> StoredObject:
        store.pipe_file(where, content, **({"chunksize": PART_BYTES} if _is_s3(url) else {}))
        return _checked(store, where, len(content), PART_BYTES, etag)

    return _retry(url, put)


def delete(url: str) -> None:
    """Delete an object, if it is there.

    Raises:
        StoreError: the store refuses.
        UnreachableError: the store did not answer at the last try.
    """

    def remove(store: Any, path: str) -> None:
        try:
            store.rm_file(path)
        except FileNotFoundError:
            log.debug("%s: was not there", url)

    _retry(url, remove)


def _range(store: Any, path: str, start: int, end: int, expected: StoredObject) -> bytes:
    try:
        content: bytes = store.cat_file(path, start=start, end=end)
    except OSError:
        # Such as of a range behind the end of an object that is now smaller.
        if _look_up(store, path) != expected:
            raise ObjectChangedError(f"{path}: was replaced while it was read") from None
        raise
    if len(content) != end - start:
        if _look_up(store, path) != expected:
            raise ObjectChangedError(f"{path}: was replaced while it was read")
        raise ConnectionError(f"the answer ended {end - start - len(content)} bytes early")
    return content


def _look_up(store: Any, path: str) -> StoredObject:
    try:
        info = store.info(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        if isinstance(error, PermissionError) or 400 <= status_of(error) < 500:
            # The answer to a HEAD request has no body, and so no code; that to a GET request has one.
            store.cat_file(path, start=0, end=1)
        raise
    if info.get("type") == "directory":
        raise FileNotFoundError("it is a prefix and no object")
    return _stored(info)


def _stored(info: dict[str, Any]) -> StoredObject:
    identity = next((info[name] for name in _IDENTITIES if info.get(name)), "")
    return StoredObject(int(info["size"] or 0), str(identity))


def _checked(store: Any, path: str, num_bytes: int, part_bytes: int, etag: str) -> StoredObject:
    """The object that was sent.

    Args:
        etag: that S3 gives such an object; empty: of another store, of which the size is compared.

    Raises:
        ConnectionError: another object is there.
    """
    stored = _look_up(store, path)
    if stored.num_bytes != num_bytes:
        raise ConnectionError(f"the object has {stored.num_bytes} bytes after {num_bytes} were sent")
    if etag and stored.identity.strip('"') != etag and not is_encrypted_by_key(store, path):
        # Damaged; or of a server of S3's protocol whose ETags are no checksums.
        ends = [*range(0, num_bytes, CHUNK_BYTES), num_bytes]
        content = (store.cat_file(path, start=start, end=end) for start, end in itertools.pairwise(ends))
        if etag_of(content, num_bytes, part_bytes) != etag:
            raise ConnectionError("the object is not what was sent")
    return stored


def _retry(url: str, call: Callable[[Any, str], Result], tries_of_request: int = 1) -> Result:
    """Call with the URL's file system and the path in it, again after what may pass.

    Args:
        tries_of_request: by the store's package, within a call that makes many requests.
    """
    has_renewed = False
    pauses_s = [*PAUSES_S]
    while True:
        try:
            store = _file_system(url, tries_of_request)
            return call(store, store._strip_protocol(url))
        except (Unimo3Error, ObjectChangedError):
            raise
        except Exception as error:
            failure = error
        if is_expired(failure) and not has_renewed:
            # The files of the credentials may have been renewed since they were read.
            has_renewed = True
            _open.pop((os.getpid(), _bucket(url), tries_of_request), None)
            continue
        if problem := permanent_problem(failure, url.partition("://")[0].lower()):
            raise StoreError(f"{url}: {problem}") from failure
        message = plain_message(failure)
        if not pauses_s:
            raise UnreachableError(
                f"{url}: {message}, at the last of {1 + len(PAUSES_S)} tries; see whether the store works, then start "
                "again"
            ) from failure
        log.warning("%s: %s; trying again in %g s", url, message, pauses_s[0])
        time.sleep(pauses_s.pop(0))


def _is_s3(url: str) -> bool:
    return url.partition("://")[0].lower() in ("s3", "s3a")


def _bucket(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme.lower()}://{rest.partition('/')[0]}"


def _file_system(url: str, tries_of_request: int) -> Any:
    """The URL's file system in this process."""
    key = os.getpid(), _bucket(url), tries_of_request
    if key not in _open:
        from fsspec.core import url_to_fs

        is_s3 = _is_s3(url)
        options: dict[str, Any] = {"use_listings_cache": False}
        if is_s3:
            # One request a try, else: retries inside of retries would multiply the load on a store that throttles.
            retries = {"total_max_attempts": tries_of_request, "mode": "standard"}
            timeouts = {"connect_timeout": _TIMEOUT_S, "read_timeout": _TIMEOUT_S}
            options |= {"config_kwargs": {"retries": retries, **timeouts}, "max_concurrency": 4}
        # Not in fsspec's own cache, which a fork empties, and so closes what the parent uses.
        store, _ = url_to_fs(url, skip_instance_cache=True, **options)
        if is_s3:
            store.retries = 1
        _open.setdefault(key, store)
    return _open[key]
