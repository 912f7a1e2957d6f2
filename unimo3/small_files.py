"""The files of an exported folder or of ``RUN/model`` in an object store that are no weights, for this process alone.

Each process copies them into a temporary folder when it first needs them: before the ranks meet, no rank can wait for
another.

Source: none.
"""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from unimo3 import object_store
from unimo3.object_store import StoredObject, StoreError

# A tokenizer's largest file has some 20 MB.
_MAX_BYTES = 2**28
_WEIGHTS = (".safetensors", ".pt", ".bin")
_folders: list[tempfile.TemporaryDirectory[str]] = []  # until this process ends


@functools.cache
def fetch_small_files(url: str) -> Path:
    """A temporary folder with the objects below a prefix that are no weights; it is empty if there are none.

    Raises:
        StoreError: the URL cannot be used, or the store refuses.
        UnreachableError: the store did not answer at the last try.
    """
    object_store.check_url(url)
    folder = tempfile.TemporaryDirectory(prefix="unimo3-")
    for name, stored in safe_objects(url):
        if not name.endswith(_WEIGHTS) and stored.num_bytes <= _MAX_BYTES:
            path = Path(folder.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_small(object_store.join(url, name)))
    _folders.append(folder)
    return Path(folder.name)


def safe_objects(url: str) -> Iterator[tuple[str, StoredObject]]:
    """The objects below a prefix whose names may be those of files in a folder."""
    for name, stored in sorted(object_store.list_objects(url).items()):
        if name.isprintable() and not any(part in ("", ".", "..") for part in name.split("/")):
            yield name, stored


def read_small(url: str) -> bytes:
    """A small object's content, read again if it is replaced meanwhile.

    Raises:
        StoreError: it cannot be read, or is replaced each time.
        UnreachableError: the store did not answer at the last try.
    """
    for _ in object_store.PAUSES_S:
        try:
            return b"".join(object_store.read(url))
        except object_store.ObjectChangedError:
            continue
    raise StoreError(f"{url}: is replaced again and again; end the process that writes it")
