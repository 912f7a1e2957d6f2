"""Winoground: which of two captions of the same words is of which of two images.

    SOURCE/examples.jsonl
    IMAGES/images/, or the images in IMAGES itself

Source: https://huggingface.co/datasets/facebook/winoground, folder data.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from unimo3.data.formats.choices import choice_sample, file_name
from unimo3.data.formats.record import Sample, field, read_records, text


def convert(source: Path, images: Path, omitted: Counter[str] | None = None) -> Iterator[tuple[str, Sample]]:
    """One sample an example, with two images and their ``choices``, a caption each; nothing is skipped.

    All are of the split ``test``. ``identifier`` is the release's ``id``, ``category`` its ``collapsed_tag``.
    """
    folder = images / "images" if (images / "images").is_dir() else images
    for where, record in read_records(source / "examples.jsonl"):
        identifier = str(field(record, "id", where, int))
        files = [folder / f"{file_name(record, f'image_{number}', where)}.png" for number in range(2)]
        choices = [(text(record, f"caption_{number}", where), number) for number in range(2)]
        category = field(record, "collapsed_tag", where, str).strip()
        yield "test", choice_sample(identifier, category, identifier, files, choices)
