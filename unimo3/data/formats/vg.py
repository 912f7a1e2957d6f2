"""Visual Genome's region descriptions.

    SOURCE/region_descriptions.json
    IMAGES/VG_100K/, IMAGES/VG_100K_2/

Source: https://homes.cs.washington.edu/~ranjay/visualgenome/api_readme.html.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from unimo3.data.formats.record import Sample, distinct, field, read_json
from unimo3.errors import DataError
from unimo3.texts import is_blank, plain

_FOLDERS = ("VG_100K", "VG_100K_2")
_BOX = ("x", "y", "width", "height")


def convert(source: Path, images: Path, omitted: Counter[str] | None = None) -> Iterator[tuple[str, Sample]]:
    """One training sample an image: its distinct phrases are ``captions``, their first boxes ``regions``.

    A region is [x, y, width, height] in pixels. Empty phrases and images that have no other are skipped.
    """
    omitted = Counter() if omitted is None else omitted
    path = source / "region_descriptions.json"
    folder_of = _listing(images)
    for number, record in enumerate(read_json(path, list)):
        where = f"{path}: [{number}]"
        identity = None
        phrases: list[str] = []
        boxes: dict[str, list[int]] = {}
        for i, region in enumerate(field(record, "regions", where, list)):
            position = f"{where}.regions[{i}]"
            image_id = field(region, "image_id", position, int)
            if identity not in (None, image_id):
                raise DataError(
                    f"{position}: field 'image_id' is {image_id}, {identity} before it; one image a record expected"
                )
            identity = image_id
            phrase = plain(field(region, "phrase", position, str))
            box = [field(region, side, position, int) for side in _BOX]
            if is_blank(phrase):
                omitted["empty phrase"] += 1
                continue
            phrases.append(phrase)
            boxes.setdefault(phrase, box)
        if identity is None or not phrases:
            omitted["image without a phrase"] += 1
            continue
        captions = distinct(phrases)
        name = f"{identity}.jpg"
        content = {"image_id": identity, "captions": captions, "regions": [boxes[caption] for caption in captions]}
        yield "train", Sample(f"{identity:012d}", (folder_of.get(name, images / _FOLDERS[0]) / name,), content)


def _listing(images: Path) -> dict[str, Path]:
    # Two listings: the release does not name the folder of an image.
    folders = [images / name for name in _FOLDERS if (images / name).is_dir()]
    if not folders:
        raise DataError(f"{images}: contains neither VG_100K/ nor VG_100K_2/; --images must name the folder of both")
    return {file.name: folder for folder in folders for file in folder.iterdir()}
