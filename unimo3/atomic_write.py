"""Writes small files: complete or not at all, and with an error that names the file.

Source: rename(2) for the replacement.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors of writing name a file or folder, which those of write(2) do not, as on a disk that is full."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else its text would be lost
            error.filename = error.filename or str(path)
        raise


def replace_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a text file in UTF-8 by rename.

    Args:
        errors: of encoding, as of `open`.

    Raises:
        OSError: it cannot be written.
    """
    replace_bytes(path, text.encode("utf-8", errors))


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file by rename.

    Raises:
        OSError: it cannot be written.
    """
    staging = path.with_name(f"{path.name}.tmp")
    with naming(path):
        staging.write_bytes(content)
        staging.replace(path)
