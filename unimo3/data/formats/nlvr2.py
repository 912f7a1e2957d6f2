"""NLVR2: whether a statement is true of two images.

    SOURCE/{train,dev,test1}.json, JSON lines (or .jsonl)
    IMAGES/images/train/DIRECTORY/, IMAGES/dev/, IMAGES/test1/

Source: https://github.com/lil-lab/nlvr/tree/master/nlvr2.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from unimo3.data.formats.record import Sample, choice, field, first_file, read_records, text
from unimo3.errors import DataError
from unimo3.metrics.nlvr2 import sentence_of

# Our split, its file, its images' folder.
_SPLITS = (("train", "train", "images/train"), ("val", "dev", "dev"), ("test", "test1", "test1"))


def convert(source: Path, images: Path, omitted: Counter[str] | None = None) -> Iterator[tuple[str, Sample]]:
    """One sample a ``statement``, with its ``label``, true or false; nothing is skipped.

    ``image_id`` names the pair, which may have another statement; ``identifier`` is the release's.
    """
    for split, name, folder in _SPLITS:
        for where, record in read_records(first_file(source / f"{name}.json", source / f"{name}.jsonl")):
            identifier = text(record, "identifier", where)
            pair = identifier.rpartition("-")[0]
            try:
                sentence_of(identifier)
            except ValueError as error:
                raise DataError(f"{where}: {error}") from error
            path = images / folder
            if split == "train" and "directory" in record:
                path /= str(field(record, "directory", where, int))
            files = (path / f"{pair}-img0.png", path / f"{pair}-img1.png")
            content = {
                "image_id": pair,
                "identifier": identifier,
                "statement": text(record, "sentence", where),
                "label": choice(record, "label", where, ("True", "False")) == "True",
            }
            yield split, Sample(identifier.replace(".", "_").replace("/", "_"), files, content)
