"""Copies a run's checkpoints to an object store, so that what is seen there is complete or absent.

    RUN/push_NAME.jsonl    the objects of a checkpoint that were sent: a push after a kill sends the others
    RUN/push_NAME.lock     locked by the process that pushes to this URL; NAME is a hash of the URL

Every file is compared with its checkpoint's manifest before it is sent, and its object's size and version with what was
sent. The manifest comes last, and is deleted first where a checkpoint is removed or replaced. Files go in parallel, and
so do the parts of a large one.

Source: unimo3/checkpoint/save.py for the order of a commit.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from filelock import FileLock, Timeout

from unimo3 import object_store
from unimo3.checkpoint import store
from unimo3.checkpoint.best_record import BEST, read_best
from unimo3.checkpoint.manifest import MANIFEST, file_problem, read_entries
from unimo3.checkpoint.stored_run import CHECKPOINTS, CONFIG, FOLDERS, METRICS, NUM_JOBS, StoredRun, is_run_file
from unimo3.errors import CheckpointError, ConfigError, Interrupted, Unimo3Error, UnreachableError
from unimo3.json_lines import append_record, read_records

log = logging.getLogger(__name__)

_LATEST = f"{CHECKPOINTS}/latest"


class _Stopped(Exception):
    """A stop was requested between two files."""


class Retention:
    """How many checkpoints stay: newest ones, and multiples of a number of steps; see `store.superseded`."""

    def __init__(self, keep_last: int, keep_every: int):
        self.keep_last, self.keep_every = keep_last, keep_every

    def superseded(self, names: list[str], best: set[str]) -> list[str]:
        """The names, of checkpoints oldest first, that it removes."""
        return store.superseded(names, self.keep_last, self.keep_every, best)


class Pusher:
    """Copies one run to one prefix.

    Args:
        run: the run's folder.
        url: of the prefix.
        num_jobs: files sent at a time.
        stop: set to end after the files that are being sent.

    Raises:
        ConfigError: the folder is no run's, or another run or something else is at the prefix.
        StoreError: the URL cannot be used.
        UnreachableError: the store does not answer.
    """

    def __init__(self, run: Path, url: str, num_jobs: int = NUM_JOBS, stop: Event | None = None):
        if not (run / CONFIG).is_file():
            raise ConfigError(f"{run}: is no run's folder, it has no {CONFIG}; name the folder of a run")
        self._run, self._num_jobs, self._stop = run, num_jobs, stop or Event()
        self._remote = StoredRun(url)
        self._url = self._remote.url
        self._record = _record_of(run, self._url)
        self._sent: dict[str, Any] = {}
        self._complete: dict[str, str] = {}  # manifests, by tag, of what was found complete or made so
        self._damaged: dict[str, tuple[str, str]] = {}  # manifests and problems of what cannot be sent
        self._versions: dict[str, object] = {}  # of the run's other files that were sent
        self._check_prefix()

    def push(self, tag: str | None = None) -> list[str]:
        """Copy what is not there yet, the newest first.

        Args:
            tag: of the only checkpoint to copy. None: all.

        Returns:
            One line for each checkpoint that is damaged and not copied.

        Raises:
            CheckpointError: there is no such checkpoint.
            Interrupted: a stop was requested before all was copied.
        """
        if tag == "best":
            best = read_best(self._run)
            if best is None:
                raise CheckpointError(f"--tag best: {self._run / BEST} names none; leave --tag out for all checkpoints")
            tag = best.tag
        tags = self._local()
        if tag is not None and tag not in tags:
            raise CheckpointError(
                f"--tag {tag}: no such checkpoint in {store.folder_of(self._run)}; there are: "
                f"{', '.join(tags) or 'none'}"
            )
        if not tags:
            raise CheckpointError(f"{self._run}: has no committed checkpoint in {store.folder_of(self._run)}")
        with self._locked():
            problems = self._push_all(lambda tags: [each for each in tags if tag in (None, each)])
        if self._stop.is_set():
            raise Interrupted(f"{self._url}: asked to stop; start the same command to copy the rest")
        return problems

    def follow(self, retention: Callable[[], Retention], every_s: float, has_ended: Callable[[], bool]) -> list[str]:
        """Copy each new checkpoint and remove old ones, until the run is complete or a stop is requested.

        Args:
            retention: what stays, of the run's settings as they are now.
            every_s: seconds between two looks at the run's folder.
            has_ended: whether the run is complete, and nothing writes to its folder any more.

        Returns:
            As `push`.

        Raises:
            Interrupted: a stop was requested before all was copied.
        """
        with self._locked():
            while True:
                is_last = has_ended()  # before the look: what was written until then is seen
                is_done = False
                try:
                    retained = retention()
                    problems = self._push_all(functools.partial(self._retained, retention=retained))
                    if not self._stop.is_set():
                        self._remove_superseded(retained)
                        is_done = True
                except UnreachableError as error:
                    log.warning("%s; trying again in %g s", error, every_s)
                if is_done and is_last:
                    return problems
                if self._stop.wait(every_s):
                    if self._pending(functools.partial(self._retained, retention=retention())):
                        raise Interrupted(f"{self._url}: asked to stop; start the same command to copy the rest")
                    return self._problems()

    def _local(self) -> list[str]:
        return [folder.name for folder in store.list_checkpoints(self._run)]

    def _best(self) -> set[str]:
        best = read_best(self._run)
        return {best.tag} if best else set()

    def _retained(self, tags: list[str], retention: Retention) -> list[str]:
        """Without what would be removed there again."""
        old = retention.superseded(tags, self._best())
        return [tag for tag in tags if tag not in old]

    def _pending(self, wanted: Callable[[list[str]], list[str]]) -> list[str]:
        """Checkpoints to copy, newest first."""
        tags = []
        for tag in reversed(wanted(self._local())):
            try:
                manifest = (store.folder_of(self._run) / tag / MANIFEST).read_text(errors="replace")
            except FileNotFoundError:  # removed meanwhile
                continue
            if manifest not in (self._complete.get(tag), self._damaged.get(tag, ("", ""))[0]):
                tags.append(tag)
        return tags

    def _problems(self) -> list[str]:
        return [f"{tag}: {problem}" for tag, (_, problem) in self._damaged.items()]

    def _push_all(self, wanted: Callable[[list[str]], list[str]]) -> list[str]:
        self._remote = StoredRun(self._url)
        self._sent = {record["url"]: record for record in read_records(self._record)}
        while (pending := self._pending(wanted)) and not self._stop.is_set():
            self._push_one(pending[0])
        if not self._stop.is_set():
            self._send_run_files()
            self._send_names()
        return self._problems()

    def _push_one(self, tag: str) -> None:
        """Copy a checkpoint, unless the same one is there."""
        folder, manifest = store.folder_of(self._run) / tag, ""
        try:
            manifest = (folder / MANIFEST).read_text(errors="replace")
            entries = read_entries(manifest, folder / MANIFEST)
            if not self._is_there(tag, manifest, entries):
                self._send_run_files()  # not older than the checkpoint, whose metrics a resume reads there
                self._send(tag, manifest, entries)
            self._complete[tag] = manifest
        except _Stopped:
            return
        except UnreachableError:
            raise
        except (Unimo3Error, OSError) as error:
            if folder.exists() and not isinstance(error, CheckpointError):
                raise
            if folder.exists():
                log.error("%s is not copied: %s", folder, error)
                self._damaged[tag] = manifest, str(error)
            else:
                print(f"{tag}: removed from {self._run} meanwhile", flush=True)
            if tag not in StoredRun(self._url).tags():
                self._delete(tag)

    def _is_there(self, tag: str, manifest: str, entries: list[dict[str, Any]]) -> bool:
        sizes = {name: stored.num_bytes for name, stored in self._remote.files_of(tag).items()}
        if MANIFEST not in sizes or any(sizes.get(entry["name"]) != entry["bytes"] for entry in entries):
            return False
        return self._remote.read_manifest(tag) == manifest

    def _send(self, tag: str, manifest: str, entries: list[dict[str, Any]]) -> None:
        started = time.monotonic()
        folder, remote = store.folder_of(self._run) / tag, self._remote.files_of(tag)
        names = {entry["name"] for entry in entries}
        # The manifest of another checkpoint of this name, or of one whose files are not all there.
        self._delete_objects(tag, [MANIFEST, *(name for name in remote if name not in names)], remote)
        missing = [entry for entry in entries if not self._was_sent(self._url_of(tag, entry["name"]), entry, remote)]
        with ThreadPoolExecutor(self._num_jobs) as pool:
            try:
                for sent in as_completed([pool.submit(self._send_file, tag, folder, entry) for entry in missing]):
                    sent.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # leaving the block waits for those that run
                raise
        object_store.put_bytes(manifest.encode(), self._url_of(tag, MANIFEST))
        self._record.unlink(missing_ok=True)
        seconds, num_bytes = time.monotonic() - started, sum(entry["bytes"] for entry in missing)
        there = len(entries) - len(missing)
        print(
            f"{tag}: {num_bytes / 1e6:.1f} MB in {len(missing)} files sent in {seconds:.1f} s, "
            f"{num_bytes / 1e6 / max(seconds, 1e-3):.0f} MB/s" + (f"; {there} files were there" if there else ""),
            flush=True,
        )
        self._remote = StoredRun(self._url)

    def _was_sent(self, url: str, entry: dict[str, Any], remote: dict[str, Any]) -> bool:
        record, stored = self._sent.get(url), remote.get(entry["name"])
        return (
            record is not None
            and stored is not None
            and (record["bytes"], record["sha256"]) == (entry["bytes"], entry["sha256"])
            and (stored.num_bytes, stored.identity) == (record["bytes"], record["identity"])
        )

    def _send_file(self, tag: str, folder: Path, entry: dict[str, Any]) -> None:
        """Verify a file, send it and record it; in a thread of its own."""
        if self._stop.is_set():
            raise _Stopped
        if problem := file_problem(folder, entry):
            raise CheckpointError(problem)
        url = self._url_of(tag, entry["name"])
        stored = object_store.put_file(folder / entry["name"], url)
        append_record(self._record, {"url": url, **entry, "identity": stored.identity})

    def _send_run_files(self) -> None:
        """Send the run's other files that have changed; its settings first, which mark the prefix as this run's."""
        names = [CONFIG, METRICS]
        for folder in FOLDERS:
            paths = sorted(path for path in (self._run / folder).rglob("*") if path.is_file())
            names += [path.relative_to(self._run).as_posix() for path in paths]
        for name in filter(is_run_file, names):
            self._send_if_changed(name)

    def _send_names(self) -> None:
        """Send what names checkpoints, of those that are complete there."""
        tags = StoredRun(self._url).tags()
        if tags and self._versions.get(_LATEST) != tags[-1]:
            object_store.put_bytes(tags[-1].encode(), self._remote.url_of(_LATEST))
            self._versions[_LATEST] = tags[-1]
        best = read_best(self._run)
        if best is not None and best.tag in tags:
            self._send_if_changed(BEST)

    def _send_if_changed(self, name: str) -> None:
        path = self._run / name
        try:
            status = path.stat()
            version = status.st_mtime_ns, status.st_size
            if self._versions.get(name) != version:
                # Read at once: a file that grows would differ from the size that was announced.
                object_store.put_bytes(path.read_bytes(), self._remote.url_of(name))
                self._versions[name] = version
        except FileNotFoundError:
            log.debug("%s: is not there", path)

    def _remove_superseded(self, retention: Retention) -> None:
        """Remove old checkpoints there, and what is left of incomplete ones; never one that the run has not reached."""
        local = self._local()
        if not local:
            return
        remote = StoredRun(self._url)
        newest = store.step_of(Path(local[-1]))
        reached = [tag for tag in remote.tags() if store.step_of(Path(tag)) <= newest]
        best = self._best() | {tag for tag in [remote.best_tag()] if tag}
        incomplete = [tag for tag in remote.begun() if tag not in remote.tags() and tag not in local]
        self._remote = remote
        for tag in [*retention.superseded(reached, best), *incomplete]:
            if store.step_of(Path(tag)) <= newest:
                self._delete(tag)
                self._complete.pop(tag, None)
                print(f"{tag}: removed from {self._url}", flush=True)
        if ahead := [tag for tag in remote.tags() if store.step_of(Path(tag)) > newest]:
            log.warning(
                "%s: %s: later than the run's newest checkpoint and not removed; delete them if the run was set back",
                self._url,
                ", ".join(ahead),
            )

    def _delete(self, tag: str) -> None:
        """Delete a checkpoint there, its manifest first."""
        remote = StoredRun(self._url).files_of(tag)
        self._delete_objects(tag, [MANIFEST, *(name for name in remote if name != MANIFEST)], remote)

    def _delete_objects(self, tag: str, names: list[str], remote: dict[str, Any]) -> None:
        for name in names:
            if name in remote:
                object_store.delete(self._url_of(tag, name))

    def _url_of(self, tag: str, name: str) -> str:
        return self._remote.url_of(f"{CHECKPOINTS}/{tag}/{name}")

    def _check_prefix(self) -> None:
        """Refuse a prefix of another run, or with something else."""
        objects = self._remote.objects
        if CONFIG in objects:
            if self._remote.read(CONFIG) != (self._run / CONFIG).read_bytes():
                raise ConfigError(
                    f"{self._url}: its {CONFIG} is not that of {self._run}, so another run is there; choose another URL"
                )
        elif objects:
            raise ConfigError(
                f"{self._url}: contains {min(objects)} and no {CONFIG}, so it is no copy of a run; choose another URL"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with FileLock(self._record.with_suffix(".lock"), timeout=0, fallback_to_soft=False):
                yield
        except Timeout as error:
            raise ConfigError(f"{self._run}: another process pushes it to {self._url}; wait for its end") from error


def _record_of(run: Path, url: str) -> Path:
    return run / f"push_{hashlib.sha256(url.encode()).hexdigest()[:12]}.jsonl"
