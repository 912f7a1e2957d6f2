"""Flickr30K in Karpathy's splits.

    SOURCE/dataset_flickr30k.json
    IMAGES/flickr30k-images/, or the photos in IMAGES itself

Source: https://cs.stanford.edu/people/karpathy/deepimagesent, https://shannon.cs.illinois.edu/DenotationGraph.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimo3.data.formats.karpathy import read_captions
from unimo3.data.formats.record import Sample, field
from unimo3.errors import DataError

_KEY_DIGITS = 12


def convert(source: Path, images: Path, omitted: Counter[str] | None = None) -> Iterator[tuple[str, Sample]]:
    """One sample an image, with all its ``captions``; empty captions are skipped."""
    folder = photo_folder(images)
    for where, image, split, captions in read_captions(source / "dataset_flickr30k.json", omitted):
        photo = photo_number(image, "filename", where)
        content = {"image_id": int(photo), "captions": captions}
        yield split, Sample(f"{int(photo):012d}", (folder / f"{photo}.jpg",), content)


def photo_folder(images: Path) -> Path:
    """The folder of Flickr30K's photos."""
    folder = images / "flickr30k-images"
    return folder if folder.is_dir() else images


def photo_number(record: Any, name: str, where: str) -> str:
    """The digits that a photo's file is named after, from a field that contains them or the file's name."""
    value = field(record, name, where, str)
    digits = value.removesuffix(".jpg")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _KEY_DIGITS):
        raise DataError(
            f"{where}: field '{name}' is {value!r}; a photo's number of at most {_KEY_DIGITS} digits expected, as in "
            "the public release"
        )
    return digits
