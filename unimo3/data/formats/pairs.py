"""One caption an image: what SBU and CC3M have in common.

Source: https://github.com/dandelin/ViLT/blob/master/DATA.md for the lists of what was downloaded.
"""

import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from unimo3.data.formats.record import Sample, read_json
from unimo3.errors import DataError
from unimo3.texts import is_blank, plain

Pair = tuple[int, Path, str]
"""Row, image file, caption."""


def pair_samples(split: str, pairs: Iterable[Pair], omitted: Counter[str]) -> Iterator[tuple[str, Sample]]:
    """One sample a pair, with its row as ``image_id``; empty captions are skipped."""
    for row, file, caption in pairs:
        if not is_blank(caption):
            yield split, Sample(f"{row:09d}", (file,), {"image_id": row, "captions": [plain(caption)]})
        else:
            omitted["empty caption"] += 1


def read_annot(path: Path, images: Path) -> Iterator[Pair]:
    """The pairs of a list of [path, caption], each path below `images` or, if its folder is not there, in it."""
    folders: dict[str, Path] = {}
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
        yield row, folders[parent] / name, entry[1]
