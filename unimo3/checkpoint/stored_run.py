"""A run's copy in an object store, as a listing shows it.

    URL/config.yaml, model/, metrics.jsonl, ledger/    what a resume reads, without the checkpoints
    URL/checkpoints/step_00001000/                     files; MANIFEST.json is written last and deleted first
    URL/checkpoints/latest, URL/best.json              written after the checkpoint that they name

A checkpoint without MANIFEST.json is absent for every reader.

Source: unimo3/checkpoint/store.py for the same on a disk.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from unimo3 import object_store
from unimo3.checkpoint.best_record import BEST
from unimo3.checkpoint.manifest import MANIFEST, read_entries
from unimo3.checkpoint.store import is_tag
from unimo3.errors import CheckpointError
from unimo3.object_store import ObjectChangedError, StoredObject, StoreError, is_store
from unimo3.small_files import read_small

CONFIG, METRICS, CHECKPOINTS = "config.yaml", "metrics.jsonl", "checkpoints"
FOLDERS = ("model", "ledger")
# Files copied at a time; of a large one, parts are sent and ranges are received in parallel too.
NUM_JOBS, NUM_RANGES = 4, 4
RANGE_BYTES = object_store.CHUNK_BYTES


class StoredRun:
    """One listing of a run's objects.

    Args:
        url: of the run's prefix; nothing has to be there.

    Attributes:
        objects: by their names relative to the prefix.

    Raises:
        StoreError: it is no URL of a store, or the store refuses.
        UnreachableError: the store did not answer at the last try.
    """

    def __init__(self, url: str):
        object_store.check_url(url)
        self.url = url.rstrip("/")
        self.objects = object_store.list_objects(self.url)

    def tags(self) -> list[str]:
        """Checkpoints that are complete, oldest first."""
        return [tag for tag in self.begun() if f"{CHECKPOINTS}/{tag}/{MANIFEST}" in self.objects]

    def begun(self) -> list[str]:
        """Checkpoints of which there is an object, complete or not, oldest first."""
        parts = [PurePosixPath(name).parts for name in self.objects]
        tags = {part[1] for part in parts if len(part) > 2 and part[0] == CHECKPOINTS and is_tag(part[1])}
        return sorted(tags, key=lambda tag: (len(tag), tag))

    def files_of(self, tag: str) -> dict[str, StoredObject]:
        """A checkpoint's objects by their names in its folder."""
        start = f"{CHECKPOINTS}/{tag}/"
        return {name.removeprefix(start): stored for name, stored in self.objects.items() if name.startswith(start)}

    def run_files(self) -> list[str]:
        """The files of the run that a resume reads, without its checkpoints and without `BEST`."""
        return sorted(name for name in self.objects if is_run_file(name))

    def url_of(self, name: str) -> str:
        """The URL of an object by its name relative to the prefix."""
        return object_store.join(self.url, name)

    def read(self, name: str) -> bytes:
        """A small object's content.

        Raises:
            StoreError: it is not there, the store refuses, or it is replaced each time while it is read.
            UnreachableError: the store did not answer at the last try.
        """
        return read_small(self.url_of(name))

    def read_manifest(self, tag: str) -> str:
        """The manifest's text of a checkpoint that is complete."""
        return self.read(f"{CHECKPOINTS}/{tag}/{MANIFEST}").decode(errors="replace")

    def verify(self, tag: str) -> list[str]:
        """Compare a checkpoint's objects with its manifest; one line a problem."""
        where = f"{CHECKPOINTS}/{tag}"
        entries = read_entries(self.read_manifest(tag), self.url_of(f"{where}/{MANIFEST}"))
        with ThreadPoolExecutor(NUM_JOBS) as pool:
            problems = list(pool.map(lambda entry: _problem(self.url_of(f"{where}/{entry['name']}"), entry), entries))
        return [problem for problem in problems if problem]

    def best_tag(self) -> str | None:
        """The checkpoint that is best on held-out data; None: none is recorded that is complete here."""
        if BEST not in self.objects:
            return None
        try:
            tag = json.loads(self.read(BEST))["tag"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return tag if tag in self.tags() else None

    def choose(self, tag: str | None) -> str:
        """The checkpoint that a tag names: a name, ``best``, or None for the newest complete one.

        Raises:
            CheckpointError: there is none.
        """
        tags = self.tags()
        if not tags:
            raise CheckpointError(
                f"{self.url}: has no complete checkpoint; name the URL of a run that "
                "python -m pretrain.checkpoints push has copied"
            )
        if tag == "best":
            if (best := self.best_tag()) is None:
                raise CheckpointError(
                    f"--tag best: {self.url_of(BEST)} names no checkpoint that is complete there; leave --tag out for "
                    "the newest"
                )
            return best
        if tag is not None and tag not in tags:
            raise CheckpointError(f"--tag {tag}: no complete checkpoint in {self.url}; there are: {', '.join(tags)}")
        return tag or tags[-1]


def folder_or_url(word: str) -> Path | str:
    """An argument that names a folder, or a URL in an object store, which stays a text."""
    return word if is_store(word) else Path(word)


def receive(url: str, write: Callable[[bytes], object], entry: dict[str, Any], received: Iterable[bytes] = ()) -> str:
    """Pass an object's content on; what differs from its entry of the manifest, empty: nothing.

    Args:
        write: takes the content in order; ranges of a large object are requested in parallel.
        received: the content's beginning, which is not requested.

    Raises:
        ObjectChangedError: it was replaced while it was read.
        StoreError: it is not there, or the store refuses.
        UnreachableError: the store did not answer at the last try.
    """
    digest, num_bytes = hashlib.sha256(), 0
    for chunk in received:
        digest.update(chunk)
        num_bytes += len(chunk)
    for chunk in object_store.read(url, RANGE_BYTES, NUM_RANGES, range(num_bytes, sys.maxsize)):
        digest.update(chunk)
        write(chunk)
        num_bytes += len(chunk)
    if num_bytes != entry["bytes"]:
        return f"{entry['name']} has {num_bytes} bytes, not {entry['bytes']}"
    return "" if digest.hexdigest() == entry["sha256"] else f"{entry['name']} does not match its SHA-256"


def _problem(url: str, entry: dict[str, Any]) -> str:
    try:
        return receive(url, len, entry)
    except (StoreError, ObjectChangedError) as error:
        return f"{entry['name']}: {error}"


def is_run_file(name: str) -> bool:
    """Whether a file of a run's folder, by its relative name, is copied in addition to checkpoints and `BEST`."""
    parts = name.split("/")
    if not name.isprintable() or any(part in ("", ".", "..") or part.endswith(".tmp") for part in parts):
        return False
    return name in (CONFIG, METRICS) or (len(parts) > 1 and parts[0] in FOLDERS)
