"""Writes small files: complete or not at all, and with an error that names the file.

Source: rename(2) for the replacement.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def is_file_name(path: Path) -> bool:
    """Whether a file can have this path: a name that is no folder's, in a folder that exists."""
    try:
        return bool(path.name) and not path.is_dir() and path.resolve().parent.is_dir()
    except OSError:  # a name that is too long
        return False


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
        try:
            staging.write_bytes(content)
            staging.replace(path)
        except OSError:
            with suppress(OSError):
                staging.unlink(missing_ok=True)
            raise
