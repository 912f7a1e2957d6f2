"""Karpathy's split files: what COCO's and Flickr30K's have in common.

Source: https://cs.stanford.edu/people/karpathy/deepimagesent (caption_datasets.zip).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimo3.data.formats.record import choice, distinct, field, read_json, text
from unimo3.errors import DataError

_SPLITS = ("train", "restval", "val", "test")


def read_captions(path: Path) -> Iterator[tuple[str, dict[str, Any], str, list[str]]]:
    """Each image's place in the file, record, split and captions; ``restval`` joins training."""
    for number, image in enumerate(field(read_json(path, dict), "images", path, list)):
        where = f"{path}: images[{number}]"
        split = choice(image, "split", where, _SPLITS)
        sentences = field(image, "sentences", where, list)
        captions = [text(sentence, "raw", f"{where}.sentences[{i}]") for i, sentence in enumerate(sentences)]
        if not captions:
            raise DataError(f"{where}.sentences: is empty; every image needs at least one caption")
        yield where, image, "train" if split == "restval" else split, distinct(captions)
