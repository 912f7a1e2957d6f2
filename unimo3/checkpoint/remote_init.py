"""What a new run starts from, where it is in an object store: an exported folder, or a run or one of its checkpoints.

Rank 0 copies the weights into the new run's folder, which all nodes share, and verifies them there.

Source: none.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from unimo3 import object_store
from unimo3.checkpoint import store
from unimo3.checkpoint.pull import pull
from unimo3.checkpoint.stored_run import CONFIG, NUM_JOBS, NUM_RANGES, StoredRun
from unimo3.errors import CheckpointError
from unimo3.small_files import fetch_small_files, safe_objects

log = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"(.+)/checkpoints/(step_\d{8,})/?")
_CHUNK_BYTES = 2**20


class RemoteInit(NamedTuple):
    """What an ``init`` names.

    Attributes:
        url: of the run, or of the exported folder.
        tag: of the checkpoint, if the URL names one itself.
        files: local folder with configuration and tokenizer; no weights are in it.
    """

    url: str
    tag: str | None
    is_run: bool
    files: str


@functools.cache
def look_at(init: str) -> RemoteInit:
    """What is at the URL `init`; it is looked up once a process.

    Raises:
        CheckpointError: there is neither an exported folder nor a run with a complete checkpoint.
        StoreError: the URL cannot be used, or the store refuses.
        UnreachableError: the store does not answer.
    """
    match = _CHECKPOINT.fullmatch(init)
    url, tag = (match[1], match[2]) if match else (init.rstrip("/"), None)
    listed = StoredRun(url)
    is_run = match is not None or CONFIG in listed.objects or bool(listed.begun())
    if is_run:
        listed.choose(tag)
    elif "config.json" not in listed.objects:
        raise CheckpointError(
            f"init or model.init: '{init}': is neither an exported folder, which has a config.json, nor a run that "
            "python -m pretrain.checkpoints push has copied"
        )
    return RemoteInit(url, tag, is_run, str(fetch_small_files(f"{url}/model" if is_run else url)))


def newest_tag(source: RemoteInit) -> str:
    """The checkpoint to start from: the one that is named, or the newest one there now; empty of an exported folder."""
    return StoredRun(source.url).choose(source.tag) if source.is_run else ""


def fetch_run(source: RemoteInit, run: Path) -> Path:
    """Copy a run's checkpoint into the folder `run`; the checkpoint's folder.

    Raises:
        CheckpointError: there is no good one.
    """
    tags = pull(source.url, run, source.tag, takes_best=False)
    return store.folder_of(run) / tags[0]


def fetch_exported(url: str, out: Path) -> None:
    """Copy an exported folder; it appears by a rename, verified.

    Raises:
        CheckpointError: a tensor is not the one that was exported.
        StoreError: the store refuses.
        UnreachableError: the store does not answer.
    """
    staging = out.with_name(f"{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    objects = dict(safe_objects(url))
    for name in objects:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)

    def fetch(name: str) -> None:
        with (staging / name).open("wb") as file:
            for chunk in object_store.read(object_store.join(url, name), num_parallel=NUM_RANGES):
                file.write(chunk)

    with ThreadPoolExecutor(NUM_JOBS) as pool:
        for _ in pool.map(fetch, objects):
            pass
    if problems := changed_tensors(staging):
        raise CheckpointError(f"{url}: {'; '.join(problems)}; copy the exported folder there again")
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    log.info("init: %s copied to %s", url, out)


def changed_tensors(folder: Path) -> list[str]:
    """Compare the tensors of an exported folder with its report; one line a problem, none without a report."""
    from unimo3.checkpoint.export import REPORT  # imports torch

    if not (folder / REPORT).is_file():
        return []
    try:
        tensors = json.loads((folder / REPORT).read_bytes())["tensors"]
        expected = {tensor["name"]: tensor["sha256"] for tensor in tensors}
        actual = {name: sha256 for path in folder.glob("*.safetensors") for name, sha256 in _hashes(path).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return [f"its files cannot be read ({type(error).__name__}: {error})"]
    changed = sorted(name for name, sha256 in expected.items() if actual.get(name) != sha256)
    return [f"{len(changed)} tensors are not those that were exported, such as {changed[0]}"] if changed else []


def _hashes(path: Path) -> dict[str, str]:
    """The SHA-256 of each tensor's bytes in a safetensors file."""
    hashes = {}
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(num_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            file.seek(8 + num_bytes + start)
            digest, left = hashlib.sha256(), end - start
            while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
            hashes[name] = digest.hexdigest()
    return hashes
