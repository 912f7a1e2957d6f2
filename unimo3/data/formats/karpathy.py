"""Karpathy's split files: what COCO's and Flickr30K's have in common.

Source: https://cs.stanford.edu/people/karpathy/deepimagesent (caption_datasets.zip).
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimo3.data.formats.record import choice, distinct, field, read_json
from unimo3.errors import DataError
from unimo3.texts import is_blank

_SPLITS = ("train", "restval", "val", "test")


def read_captions(path: Path, omitted: Counter[str] | None) -> Iterator[tuple[str, dict[str, Any], str, list[str]]]:
    """Each image's position in the file, record, split and captions; ``restval`` joins training."""
    for number, image in enumerate(field(read_json(path, dict), "images", path, list)):
        where = f"{path}: images[{number}]"
        split = choice(image, "split", where, _SPLITS)
        sentences = field(image, "sentences", where, list)
        texts = [field(sentence, "raw", f"{where}.sentences[{i}]", str) for i, sentence in enumerate(sentences)]
        captions = distinct(texts)
        if not captions:
            raise DataError(f"{where}.sentences: have no text; every image needs at least one caption")
        if omitted is not None and (num_empty := sum(map(is_blank, texts))):
            omitted["empty caption"] += num_empty
        yield where, image, "train" if split == "restval" else split, captions
