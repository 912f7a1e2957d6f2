"""Own images and captions: a table, or a folder of images with text files next to them.

    SOURCE.csv, .tsv, .jsonl, .parquet   a row has an image and one or several captions; an image may have several rows
    SOURCE/a/1.jpg, SOURCE/a/1.txt       a caption a line

An image is a path below IMAGES, an absolute path, or a URL whose file is in IMAGES under the URL's last part. A row
without a usable image or caption is rejected, listed, and counts towards ``--max-reject-ratio``.

Source: none; open_clip's CSV and img2dataset's files format have the same parts.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote, urlsplit

from unimo3.data.formats.record import Sample, distinct
from unimo3.data.formats.tables import Row, TableOptions, read_table
from unimo3.data.members import IMAGE_EXTENSIONS
from unimo3.errors import DataError

_SPLIT = re.compile(r"[A-Za-z0-9_-]+")
_TRAIN, _VAL = "train", "val"


@dataclass(frozen=True)
class PairsOptions:
    """Columns, and how rows become splits.

    Attributes:
        image_column: path or URL of the image.
        caption_columns: each a text or, in JSON lines and Parquet, a list of texts.
        id_column: names the image, as a number or a text; empty: its path does.
        split_column: the split's name; empty: `val_ratio` decides.
        val_ratio: fraction of the images that become ``val``, the others ``train``; decided for each image by its id.
        seed: of that decision.
    """

    image_column: str = "image"
    caption_columns: tuple[str, ...] = ("caption",)
    id_column: str = ""
    split_column: str = ""
    val_ratio: float = 0.0
    seed: int = 0
    table: TableOptions = field(default_factory=TableOptions)

    @property
    def columns(self) -> list[str]:
        """All columns that are read."""
        return [name for name in (self.image_column, *self.caption_columns, self.id_column, self.split_column) if name]


@dataclass
class _Image:
    """An image and the captions of its rows.

    Attributes:
        row: the first one's number.
        identity: by which rows are of the same image.
    """

    row: int
    where: str
    file: Path
    identity: str
    image_id: int | str
    split: str
    captions: list[str]


class _BadRowError(Exception):
    """Why a row cannot be used."""


DEFAULTS = PairsOptions()


def convert(
    source: Path, images: Path, omitted: Counter[str] | None = None, options: PairsOptions = DEFAULTS
) -> Iterator[tuple[str, Sample]]:
    """One sample an image, with the captions of all its rows, in the order of the first ones; then the bad rows."""
    if source.is_dir():
        options = PairsOptions(val_ratio=options.val_ratio, seed=options.seed, table=options.table)
        rows = _read_folder(source, options.table.encoding, Counter() if omitted is None else omitted)
    else:
        rows = read_table(source, options.columns, options.table)
    of_identity: dict[str, _Image] = {}
    rejects = []
    for number, row in enumerate(rows):
        try:
            image = _image_of(row, number, images, options)
            _add(of_identity, image, options)
        except _BadRowError as error:
            rejects.append(Sample(f"{number:09d}", (Path(row.where),), {}, problem=str(error)))
    splits = Counter(image.split for image in of_identity.values())
    if options.val_ratio and of_identity and len(splits) < 2:
        raise DataError(
            f"--val-ratio {options.val_ratio:g}: all {len(of_identity)} images are in {next(iter(splits))}; choose "
            "another ratio or --seed"
        )
    for image in of_identity.values():
        content = {"image_id": image.image_id, "captions": distinct(image.captions)}
        yield image.split, Sample(f"{image.row:09d}", (image.file,), content)
    for reject in rejects:
        yield _TRAIN, reject


def _image_of(row: Row, number: int, images: Path, options: PairsOptions) -> _Image:
    if row.problem:
        raise _BadRowError(row.problem)
    path = _path_of(row.values.get(options.image_column), options.image_column)
    image_id: int | str = number
    if options.id_column:
        image_id = _id_of(row.values.get(options.id_column), options.id_column)
    # As written, not where the folder is: a moved data set has the same splits.
    identity = str(image_id) if options.id_column else str(path)
    captions = [text for name in options.caption_columns for text in _texts_of(row.values.get(name), name)]
    if not distinct(captions):
        raise _BadRowError(f"has no caption in {' or '.join(map(repr, options.caption_columns))}")
    split = _TRAIN if _fraction(options.seed, identity) >= options.val_ratio else _VAL
    if options.split_column:
        split = str(row.values.get(options.split_column) or "").strip()
        if not _SPLIT.fullmatch(split):
            raise _BadRowError(f"split in {options.split_column!r} is {split!r}; letters, digits, - and _ expected")
    return _Image(number, row.where, images / path, identity, image_id, split, captions)


def _add(of_identity: dict[str, _Image], image: _Image, options: PairsOptions) -> None:
    """Add a row's captions to those of the earlier rows about the same image."""
    first = of_identity.setdefault(image.identity, image)
    if first is image:
        return
    if first.file != image.file:
        raise _BadRowError(f"{options.id_column!r} {image.image_id!r} is {first.file.name} at {first.where}")
    if first.split != image.split:
        raise DataError(
            f"{image.where}: {image.file.name} is in the splits {first.split} ({first.where}) and {image.split}; "
            "held-out images must not be trained on: correct one of the rows"
        )
    first.captions += image.captions


def _path_of(value: Any, column: str) -> PurePath:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise _BadRowError(f"has no image in {column!r}")
    value = value.strip()
    if "://" not in value:
        return PurePath(value)
    try:
        name = unquote(urlsplit(value).path).rpartition("/")[2]
    except ValueError:  # raised by urlsplit for brackets in a host
        name = ""
    if name in ("", ".", "..") or "\0" in name:
        raise _BadRowError(f"URL in {column!r} does not end in a file name")
    return PurePath(name)


def _id_of(value: Any, column: str) -> int | str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        value = value.strip()
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise _BadRowError(f"id in {column!r} is {value!r}; a number or a text expected")
    return value


def _texts_of(value: Any, column: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str | None) for text in values):
        raise _BadRowError(f"caption in {column!r} is {value!r:.60}; a text or a list of texts expected")
    return [text.encode("utf-8", "replace").decode() for text in values if text is not None]


def _fraction(seed: int, identity: str) -> float:
    """A number in [0, 1) that stays the same for an image when others are added."""
    digest = hashlib.sha256(f"{seed} {identity}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _read_folder(folder: Path, encoding: str, omitted: Counter[str]) -> Iterator[Row]:
    """A row an image, by path; what is neither an image nor its text file is omitted."""
    paths = sorted(path for path in folder.rglob("*") if not path.name.startswith(".") and path.is_file())
    images = [path for path in paths if path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS]
    if not images:
        raise DataError(f"--src {folder}: has no image; name a table, or a folder of images with .txt files")
    texts = {path.with_suffix(".txt") for path in images}
    if others := set(paths) - set(images) - texts:
        omitted["neither an image nor its text file"] += len(others)
    for path in images:
        text_file = path.with_suffix(".txt")
        try:
            lines = text_file.read_text(encoding=encoding).splitlines()
        except OSError as error:
            yield Row(str(path), {}, f"{text_file.name} cannot be read ({error.strerror})")
        except UnicodeDecodeError:
            yield Row(str(path), {}, f"{text_file.name} is not {encoding}; give its --encoding")
        else:
            yield Row(str(path), {"image": str(path.relative_to(folder)), "caption": lines})
