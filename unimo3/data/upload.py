"""A conversion into an object store: complete in a local folder first, then sent, its indexes last.

    STAGING/          the complete conversion; removed when all of it is in the store
    STAGING.upload    the conversion's arguments, then each object that was sent: a start after a kill sends the others

A split without its index.json cannot be read, so what is in the store is complete or absent. Where an earlier
conversion is replaced, its indexes are deleted before its shards are.

Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/Welcome.html#ConsistencyModel, by which an object that was
written is seen by all who read after it.
"""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unimo3 import object_store
from unimo3.data.conversion import EXTRAS, MARK, Conversion, convert, remove_output, sibling_folders
from unimo3.data.index import INDEX, MEMBERS, ShardIndex
from unimo3.data.members import sha256_of
from unimo3.errors import ConfigError, DataError, Unimo3Error
from unimo3.json_lines import append_record, read_records
from unimo3.object_store import StoredObject, StoreError

log = logging.getLogger(__name__)

# Each sends an object of up to 100 MB from memory, or four parts of 50 MB.
_NUM_THREADS = 4
_REPORT_EVERY_S = 30.0
_RECORD_SUFFIX = ".upload"


def convert_and_upload(wanted: Conversion, comm: Any) -> None:
    """Convert into the local folder `wanted.out`, send it to `wanted.url` and remove it; every rank calls it.

    Raises:
        ConfigError: the prefix or the local folder cannot be used, or another process is at work there.
        DataError: the source is invalid, or the store refuses an object.
        UnreachableError: the store does not answer.
    """
    leads = comm is None or comm.rank == 0
    error, is_converted = None, False
    if leads:
        try:
            is_converted = check_upload(wanted)
            if not is_converted:
                wanted.out.parent.mkdir(parents=True, exist_ok=True)
                _record_of(wanted).unlink(missing_ok=True)
                append_record(_record_of(wanted), _header_of(wanted))
        except Unimo3Error as raised:
            error = raised
    if comm is not None:
        is_failed, is_converted = comm.bcast((error is not None, is_converted))
        if is_failed and not leads:
            return
    if error is not None:
        raise error
    if not is_converted:
        convert(wanted, comm)
    if leads:
        _send(wanted)


def check_upload(wanted: Conversion) -> bool:
    """Refuse before hours of work what cannot be sent.

    Returns:
        Whether the local folder is complete, from a command that was killed, and only has to be sent.

    Raises:
        ConfigError: the store refuses; there are objects that may not be replaced; the local folder is not that of this
            command.
        UnreachableError: the store does not answer.
    """
    if wanted.out.exists():
        records = read_records(_record_of(wanted))
        if records[:1] == [_header_of(wanted)]:
            return True
        reason = "is of a command with other arguments" if records else "was not made to be sent"
        raise ConfigError(f"--staging {wanted.out}: exists and {reason}; choose another folder, or remove this one")
    try:
        _check_replaceable(wanted, list(object_store.list_objects(wanted.url)))
    except StoreError as error:
        raise ConfigError(f"--out {error}") from error
    return False


def _record_of(wanted: Conversion) -> Path:
    return wanted.out.with_name(wanted.out.name + _RECORD_SUFFIX)


def _header_of(wanted: Conversion) -> dict[str, Any]:
    arguments = {name: str(value) for name, value in vars(wanted).items() if name not in ("out", "converter")}
    return arguments | {"options of the format": str(getattr(wanted.converter, "keywords", ""))}


def _check_replaceable(wanted: Conversion, names: list[str]) -> None:
    if names and not wanted.overwrite:
        raise ConfigError(
            f"--out {wanted.url}: {len(names)} objects are there, such as {min(names)}; choose another prefix or give "
            "--overwrite"
        )
    splits = {name.split("/")[0] for name in names if name.partition("/")[2] in (INDEX, MARK)}
    if others := sorted(name for name in names if name.split("/")[0] not in {*splits, *EXTRAS}):
        raise ConfigError(
            f"--out {wanted.url}: contains other things than shards, such as {others[0]}; --overwrite replaces only "
            "what this program wrote"
        )


def _send(wanted: Conversion) -> None:
    with _locked(wanted):
        try:
            _Sender(wanted).send()
        except StoreError as error:
            raise DataError(str(error)) from error
        # Renamed first: a folder that is half removed is never sent in place of the complete one.
        replaced = sibling_folders(wanted.out)[1]
        remove_output(replaced)
        wanted.out.rename(replaced)
        _record_of(wanted).unlink()
        remove_output(replaced)


@contextmanager
def _locked(wanted: Conversion) -> Iterator[None]:
    path = Path(f"{_record_of(wanted)}.lock")
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout as error:
        raise ConfigError(f"--staging {wanted.out}: another process is sending it; wait for its end") from error
    path.unlink(missing_ok=True)


class _Sender:
    """Sends what is not there yet, and what makes it readable last."""

    def __init__(self, wanted: Conversion):
        self._wanted = wanted
        files = [path for path in wanted.out.rglob("*") if path.is_file()]
        self._paths = {path.relative_to(wanted.out).as_posix(): path for path in files}
        self._sha256 = self._checksums()
        self._sent = {record["name"]: record for record in read_records(_record_of(wanted))[1:]}
        self._remote = object_store.list_objects(wanted.url)
        self._num_sent = 0
        self._shown = time.monotonic()

    def _checksums(self) -> dict[str, str]:
        """Of shards and tables as their indexes have them; other files are small and are read."""
        listed: dict[str, str] = {}
        for name, path in self._paths.items():
            split, _, rest = name.partition("/")
            if rest == INDEX:
                index = ShardIndex(path.parent)
                listed |= {f"{split}/{shard.name}": shard.sha256 for shard in index.shards}
                listed[f"{split}/{MEMBERS}"] = index.members_sha256
        return {name: listed.get(name) or sha256_of(path) for name, path in self._paths.items()}

    def send(self) -> None:
        """Send all.

        Raises:
            ConfigError: the store has something that may not be replaced.
            StoreError: the store refuses an object.
        """
        if self._wanted.overwrite or not self._sent:
            _check_replaceable(self._wanted, list(self._remote))
        missing = [name for name in sorted(self._paths) if not self._is_there(name)]
        indexes = [name for name in missing if name.endswith(f"/{INDEX}")]
        replaced = [name for name in self._remote if name.endswith(f"/{INDEX}") and not self._is_there(name)]
        self._delete(replaced)
        self._put([name for name in missing if name not in indexes])
        if self._wanted.overwrite:
            self._delete([name for name in self._remote if name not in {*self._paths, *replaced}])
        self._put(indexes)
        num_bytes = sum(path.stat().st_size for path in self._paths.values())
        print(
            f"{self._wanted.url}: {len(self._paths)} objects, {num_bytes / 1e9:.3f} GB; "
            f"{len(self._paths) - len(missing)} were there already"
        )

    def _is_there(self, name: str) -> bool:
        """Whether the object is the one that was sent, and that one is the file."""
        record, path = self._sent.get(name), self._paths.get(name)
        return (
            record is not None
            and path is not None
            and (record["bytes"], record["sha256"]) == (path.stat().st_size, self._sha256[name])
            and self._remote.get(name) == StoredObject(record["bytes"], record["identity"])
        )

    def _put(self, names: list[str]) -> None:
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            started = [pool.submit(self._put_one, name) for name in names]
            try:
                for done in as_completed(started):
                    done.result()
                    self._show()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # leaving the block waits for those that run
                raise

    def _put_one(self, name: str) -> None:
        """Send an object and record it; in a thread of its own, so also if another object fails meanwhile."""
        stored = object_store.put_file(self._paths[name], self._url(name))
        record = {"name": name, "bytes": stored.num_bytes, "sha256": self._sha256[name], "identity": stored.identity}
        append_record(_record_of(self._wanted), record)

    def _show(self) -> None:
        self._num_sent += 1
        if time.monotonic() - self._shown > _REPORT_EVERY_S:
            self._shown = time.monotonic()
            log.info("%s: %d of %d objects sent", self._wanted.url, self._num_sent, len(self._paths))

    def _delete(self, names: list[str]) -> None:
        for name in names:
            object_store.delete(self._url(name))

    def _url(self, name: str) -> str:
        return object_store.join(self._wanted.url, name)
