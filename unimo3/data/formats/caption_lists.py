"""One caption an image: what SBU and CC3M have in common.

Source: https://github.com/dandelin/ViLT/blob/master/DATA.md for the lists of what was downloaded.
"""

import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from unimo3.data.formats.record import Sample, read_json
from unimo3.errors import DataError
from unimo3.texts import is_blank, plain


class Pair(NamedTuple):
    """A row of a list; rows about one image have the same `image`, the first of them."""

    row: int
    image: int
    file: Path
    caption: str


def pair_samples(split: str, pairs: Iterable[Pair], omitted: Counter[str]) -> Iterator[tuple[str, Sample]]:
    """One sample a pair, with the first row of its image as ``image_id``; empty captions are skipped."""
    for row, image, file, caption in pairs:
        if not is_blank(caption):
            yield split, Sample(f"{row:09d}", (file,), {"image_id": image, "captions": [plain(caption)]})
        else:
            omitted["empty caption"] += 1


def read_annot(path: Path, images: Path) -> Iterator[Pair]:
    """The pairs of a list of [path, caption], each path below `images` or, if its folder is not there, in it."""
    folders: dict[str, Path] = {}
    first_row: dict[str, int] = {}
    for row, entry in enumerate(read_json(path, list)):
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
            raise DataError(f"{path}: [{row}]: is {reprlib.repr(entry)}; [path, caption] expected")
        parent, _, name = entry[0].rpartition("/")
        if not name:
            raise DataError(
                f"{path}: [{row}]: path is {entry[0]!r}; an image file expected, remove the record or name it"
            )
        if parent not in folders:
            # Looked at once a folder: there are a thousand files in each.
            folders[parent] = images / parent if (images / parent).is_dir() else images
        yield Pair(row, first_row.setdefault(entry[0], row), folders[parent] / name, entry[1])
    if not first_row:
        raise DataError(f"{path}: has no pair; write it again")
