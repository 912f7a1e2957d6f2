"""Examples of a caption's choice: what SugarCrepe and Winoground have in common.

Source: the releases of both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimo3.data.formats.record import Sample, text
from unimo3.errors import DataError


def choice_sample(
    identifier: str, category: str, image_id: str, files: Sequence[Path], choices: Sequence[tuple[str, int | None]]
) -> Sample:
    """One example.

    Args:
        category: whose examples have their own score; empty: none.
        choices: each caption, and the number of the image that it is of; None: of no image.
    """
    content = {
        "identifier": identifier,
        "category": category,
        "image_id": image_id,
        "choices": [{"text": caption, "image": image} for caption, image in choices],
    }
    return Sample(identifier.replace(".", "_").replace("/", "_"), tuple(files), content)


def file_name(record: Any, name: str, where: str) -> str:
    """A record's field, if it is the plain name of a file."""
    value = text(record, name, where)
    if Path(value).name != value:
        raise DataError(f"{where}: field '{name}' is {value!r}; a file's name without a folder expected")
    return value
