"""Conceptual Captions, three million.

    SOURCE/Train_GCC-training.tsv, SOURCE/Validation_GCC-1.1.0-Validation.tsv (or in SOURCE/utils/)
    SOURCE/{train,val}_image_exist.txt   the images that could be downloaded, one path a line
    IMAGES/{train,val}_image/00000042.jpg   named after the row, from 0
    SOURCE/{train,val}_annot.json, if there is one, has precedence: the [path, caption] of what was downloaded

Source: https://ai.google.com/research/ConceptualCaptions/download; write_conceptual_caption.py of
https://github.com/microsoft/BridgeTower and https://github.com/dandelin/ViLT for the files next to the release.
"""

import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from unimo3.data.formats.caption_lists import Pair, pair_samples, read_annot
from unimo3.data.formats.record import Sample, first_file, read_lines
from unimo3.errors import DataError

_TABLES = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}


def convert(source: Path, images: Path, omitted: Counter[str] | None = None) -> Iterator[tuple[str, Sample]]:
    """One sample a row, with its caption; empty captions and images that were not downloaded are skipped."""
    omitted = Counter() if omitted is None else omitted
    for split, name in _TABLES.items():
        annot = source / f"{split}_annot.json"
        if annot.is_file():
            pairs = read_annot(annot, images)
        else:
            table = first_file(source / name, source / "utils" / name)
            downloaded = _Downloaded(source / f"{split}_image_exist.txt", table)
            pairs = _read_table(table, downloaded, images / f"{split}_image", omitted)
        yield from pair_samples(split, pairs, omitted)


def _read_table(path: Path, downloaded: "_Downloaded", folder: Path, omitted: Counter[str]) -> Iterator[Pair]:
    blank, num_rows = "", 0
    for row, (where, line) in enumerate(read_lines(path)):
        if not line.strip():
            blank = blank or where
            continue
        if blank:
            raise DataError(f"{blank}: is empty; images are numbered by the rows of the release: download it again")
        num_rows += 1
        columns = line.split("\t")
        if len(columns) != 2:
            raise DataError(
                f"{where}: has {len(columns)} columns ({line[:60]!r}); caption<TAB>url expected, as released"
            )
        if "://" not in columns[1] or columns[1].startswith('"'):
            what = "a header, or no row of the release" if row == 0 else "no row of the release"
            raise DataError(
                f"{where}: is {what} ({line[:60]!r}); caption<TAB>url expected, without a header and quotes, since "
                "images are numbered from the first row on"
            )
        name = downloaded.file_name(row)
        if name is None:
            omitted["image not downloaded"] += 1
        else:
            yield Pair(row, row, folder / name, columns[0])
    if not num_rows:
        raise DataError(f"{path}: has no row; download it again")


class _Downloaded:
    """Which rows have an image: a byte a row, and names only where they are not built like the first one.

    Args:
        path: list of the images' paths.
        table: whose rows they are named after.
    """

    def __init__(self, path: Path, table: Path):
        num_rows = sum(1 for _ in read_lines(table))
        self._listed = bytearray(num_rows)
        self._odd: dict[int, str] = {}
        self._digits = 0
        self._suffix = ""
        for where, line in read_lines(path):
            name = line.strip().rpartition("/")[2]
            if name:
                self._add(name, where, table)

    def _add(self, name: str, where: str, table: Path) -> None:
        stem, dot, suffix = name.partition(".")
        if not (stem.isascii() and stem.isdigit()):
            raise DataError(
                f"{where}: is {reprlib.repr(name)}; an image named after its row expected, such as 00000042.jpg"
            )
        # More digits than any row has need not be read as a number.
        row = int(stem) if len(stem) <= 18 else len(self._listed)
        if row >= len(self._listed):
            raise DataError(
                f"{where}: is {reprlib.repr(name)}, {table.name} has {len(self._listed)} rows; use one release"
            )
        if self._listed[row]:
            raise DataError(f"{where}: is {reprlib.repr(name)}, an image of row {row} precedes it; remove one of them")
        self._listed[row] = 1
        if not self._digits:
            self._digits, self._suffix = len(stem), dot + suffix
        if name != self._usual_name(row):
            self._odd[row] = name

    def _usual_name(self, row: int) -> str:
        return f"{row:0{self._digits}d}{self._suffix}"

    def file_name(self, row: int) -> str | None:
        """The image of a row."""
        if not self._listed[row]:
            return None
        return self._odd.get(row) or self._usual_name(row)
