"""The list of a checkpoint's files with their sizes and SHA-256, by which a checkpoint is verified.

    MANIFEST.json   {"version": 1, "files": [{"name": "state.json", "bytes": 211, "sha256": "..."}, ...]}

The version is that of all files of the checkpoint. Names are relative to the checkpoint's folder, with ``/`` between
parts, and may not lead out of it.

Source: the commit files of databases; SHA-256 from FIPS 180-4.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from unimo3.errors import CHECK_MOUNT, NO_ANSWER, CheckpointError, UnreachableError, no_answer
from unimo3.versions import check_version

Result = TypeVar("Result")

MANIFEST = "MANIFEST.json"
STATE = "state.json"
_VERSION = 1
_NUM_TRIES, _PAUSE_S = 4, 5.0
# One core hashes about as fast as one disk reads; several ranks may share a node.
_MAX_THREADS = 4


def flush_and_hash(folder: Path, paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Force files to disk and return their entries for the manifest."""
    entries = []
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        entries.append({"name": name, "bytes": path.stat().st_size, "sha256": sha256_of(path)})
    return entries


def write_manifest(folder: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write the manifest to disk, and the folders' listings with it."""
    listed = sorted(entries, key=lambda entry: entry["name"])
    write_and_flush(folder / MANIFEST, json.dumps({"version": _VERSION, "files": listed}, indent=1) + "\n")
    for path in {folder / entry["name"] for entry in listed}:
        if path.parent != folder:
            flush_folder(path.parent)
    flush_folder(folder)


def verify(folder: Path, part: int = 0, num_parts: int = 1) -> list[str]:
    """Compare a checkpoint's files with its manifest.

    Args:
        part: index of the part to verify, so that each rank can read one; parts are about equal in bytes.
        num_parts: number of parts.

    Returns:
        One line a problem; none if all is well.

    Raises:
        UnreachableError: the storage gives no answer; the checkpoint may be good.
        CheckpointError: a newer program wrote it.
    """
    try:
        entries = read_with_retries(folder / MANIFEST, lambda: _read(folder))
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]
    if STATE not in [entry["name"] for entry in entries]:
        return [f"{MANIFEST} does not list {STATE}"]
    subset = sorted(entries, key=lambda entry: (-entry["bytes"], entry["name"]))[part::num_parts]
    with ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        problems = list(pool.map(lambda entry: file_problem(folder, entry), subset))
    sound = [folder / entry["name"] for entry, problem in zip(subset, problems, strict=True) if not problem]
    problems += [read_with_retries(path, partial(_content_problem, path)) for path in sound]
    if part == 0:
        # DeepSpeed and export take such files by pattern, so an unlisted one must not be in the folder.
        names = {entry["name"] for entry in entries}
        stray = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.pt"))]
        problems += [f"{name} is not listed in {MANIFEST}" for name in stray if name not in names]
    return [problem for problem in problems if problem]


def read_with_retries(path: Path, read: Callable[[], Result]) -> Result:
    """What `read` returns of a file, after a pause if the storage does not answer at first.

    Raises:
        UnreachableError: it does not answer.
        OSError: the file cannot be read for another reason.
    """
    for number in range(1, _NUM_TRIES + 1):
        try:
            return read()
        except OSError as error:
            if error.errno not in NO_ANSWER:
                raise
            if number == _NUM_TRIES:
                raise UnreachableError(
                    f"{path}: the storage does not answer ({error.strerror}, {number} tries), so "
                    f"it may be good; {CHECK_MOUNT}"
                ) from error
            time.sleep(_PAUSE_S)
    raise AssertionError("unreachable")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_and_flush(path: Path, text: str) -> None:
    """Write a text file and force it to disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def make_readable(path: Path) -> None:
    """Give a file the permissions of the user's umask; safetensors writes for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def flush_folder(folder: Path) -> None:
    """Force a folder's listing to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_problem(folder: Path, entry: dict[str, Any]) -> str:
    """What differs between a file and its entry of the manifest; empty: nothing.

    Raises:
        UnreachableError: the storage gives no answer.
    """
    return read_with_retries(folder / entry["name"], lambda: _problem(folder, entry))


def read_entries(text: str, where: Path | str) -> list[dict[str, Any]]:
    """The entries of a manifest, whose names all lie in its folder and of which one is `STATE`.

    Args:
        where: of the manifest, for messages.

    Raises:
        CheckpointError: it is damaged, or a newer program wrote it.
    """
    try:
        entries = _parse(text, where)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{where}: is damaged ({reason}); use another checkpoint") from error
    if outside := [entry["name"] for entry in entries if _leads_outside(entry["name"])]:
        raise CheckpointError(f"{where}: {outside[0]!r} points outside the folder; use another checkpoint")
    if STATE not in [entry["name"] for entry in entries]:
        raise CheckpointError(f"{where}: does not list {STATE}; use another checkpoint")
    return entries


def _read(folder: Path) -> list[dict[str, Any]]:
    return _parse((folder / MANIFEST).read_text(), folder / MANIFEST)


def _parse(text: str, where: Path | str) -> list[dict[str, Any]]:
    content = json.loads(text)
    check_version(where, content, (_VERSION,), kind=CheckpointError)
    entries = content["files"]
    for entry in entries:
        if "\0" in entry["name"] or not entry["name"].isprintable():
            raise ValueError(f"{entry['name']!r} is no name of a file here")
    return [
        {"name": str(entry["name"]), "bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for entry in entries
    ]


def _leads_outside(name: str) -> bool:
    relative = PurePosixPath(name)
    return relative.is_absolute() or ".." in relative.parts or not relative.parts


def _problem(folder: Path, entry: dict[str, Any]) -> str:
    """The problem of one listed file; empty if it has none."""
    name = entry["name"]
    if _leads_outside(name):
        return f"{name!r} in {MANIFEST} points outside the folder"
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
        if sha256_of(path) != entry["sha256"]:
            return f"{name} does not match its SHA-256"
    except (OSError, ValueError) as error:  # ValueError: of a name no file can have
        if no_answer(error):
            raise
        return f"{name!r} cannot be read ({error})"
    return ""


def _content_problem(path: Path) -> str:
    """Why a file that is as listed must not be loaded; empty if it may be."""
    if path.suffix != ".pt":
        return ""
    # Whoever can write here can write the manifest too. DeepSpeed unpickles these files without restriction, so they
    # are looked through first, restricted.
    from unimo3.checkpoint.torch_file import load_structure  # imports torch, which listing need not

    try:
        load_structure(path)
    except CheckpointError as error:
        if isinstance(silent := no_answer(error), OSError):
            raise silent from error
        return str(error)
    return ""
