"""SugarCrepe: which of two captions, alike but for an object, an attribute or a relation, is of a photo of COCO.

    SOURCE/{add,replace,swap}_{att,obj}.json, SOURCE/replace_rel.json, a dictionary of examples each
    IMAGES/val2017/, or the photos in IMAGES itself

Source: https://github.com/RAIVNLab/sugar-crepe, folder data.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from unimo3.data.formats.choices import choice_sample, file_name
from unimo3.data.formats.record import Sample, read_json, text
from unimo3.errors import DataError

CATEGORIES = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def convert(source: Path, images: Path, omitted: Counter[str] | None = None) -> Iterator[tuple[str, Sample]]:
    """One sample an example, with its two ``choices``, the right one first; nothing is skipped.

    All are of the split ``test``. ``identifier`` is the category and the example's number in its file.
    """
    folder = images / "val2017" if (images / "val2017").is_dir() else images
    for category in CATEGORIES:
        path = source / f"{category}.json"
        records = read_json(path, dict)
        if not records:
            raise DataError(f"{path}: has no record; download it again")
        for number, record in records.items():
            where = f"{path}: '{number}'"
            name = file_name(record, "filename", where)
            choices = ((text(record, "caption", where), 0), (text(record, "negative_caption", where), None))
            yield "test", choice_sample(f"{category}-{number}", category, Path(name).stem, [folder / name], choices)
