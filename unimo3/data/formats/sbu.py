"""SBU Captions.

    SOURCE/sbu-captions-all.json, the release: an image is named like its URL
    SOURCE/annot.json, if there is one, has precedence: the [path, caption] of what was downloaded

Source: https://www.cs.rice.edu/~vo9/sbucaptions; https://github.com/dandelin/ViLT/blob/master/DATA.md.
"""

import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from unimo3.data.formats.caption_lists import Pair, pair_samples, read_annot
from unimo3.data.formats.record import Sample, field, read_json
from unimo3.errors import DataError


def convert(source: Path, images: Path, omitted: Counter[str] | None = None) -> Iterator[tuple[str, Sample]]:
    """One training sample a row, with its caption; empty captions are skipped."""
    omitted = Counter() if omitted is None else omitted
    annot = source / "annot.json"
    pairs = read_annot(annot, images) if annot.is_file() else _read_release(source / "sbu-captions-all.json", images)
    yield from pair_samples("train", pairs, omitted)


def _read_release(path: Path, images: Path) -> Iterator[Pair]:
    content = read_json(path, dict)
    captions, urls = field(content, "captions", path, list), field(content, "image_urls", path, list)
    if len(captions) != len(urls):
        raise DataError(f"{path}: has {len(captions)} captions and {len(urls)} image_urls; download it again")
    first_row: dict[str, int] = {}
    for row, (caption, url) in enumerate(zip(captions, urls, strict=True)):
        if not isinstance(caption, str):
            raise DataError(
                f"{path}: captions[{row}]: is {reprlib.repr(caption)}; str expected, as in the public release"
            )
        name = _file_name(url)
        if not name:
            raise DataError(
                f"{path}: image_urls[{row}]: is {reprlib.repr(url)}; a URL that ends in a file name expected"
            )
        yield Pair(row, first_row.setdefault(name, row), images / name, caption)


def _file_name(url: object) -> str:
    if not isinstance(url, str):
        return ""
    try:
        return urlsplit(url).path.rpartition("/")[2]
    except ValueError:  # raised by urlsplit for brackets in a host
        return ""
