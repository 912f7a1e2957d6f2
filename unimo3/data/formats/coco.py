"""COCO Captions in Karpathy's splits.

    SOURCE/dataset_coco.json
    IMAGES/train2014/, IMAGES/val2014/

Source: https://cs.stanford.edu/people/karpathy/deepimagesent, https://cocodataset.org.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from unimo3.data.formats.karpathy import read_captions
from unimo3.data.formats.record import Sample, field


def convert(source: Path, images: Path, omitted: Counter[str] | None = None) -> Iterator[tuple[str, Sample]]:
    """One sample an image, with all its ``captions``; empty captions are skipped."""
    for where, image, split, captions in read_captions(source / "dataset_coco.json", omitted):
        identity = field(image, "cocoid", where, int)
        file = images / field(image, "filepath", where, str) / field(image, "filename", where, str)
        yield split, Sample(f"{identity:012d}", (file,), {"image_id": identity, "captions": captions})
