"""Images with captions to choose from: SugarCrepe and Winoground.

A sample has one image and several captions, one of which is of the image, or two images and a caption of each.

Source: SugarCrepe, arXiv 2306.14610; Winoground, arXiv 2204.03162.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from unimo3.data.index import ShardIndex
from unimo3.data.order import Unit
from unimo3.data.sample_texts import BadSampleError, content_of
from unimo3.data.samples import Inputs, SampleUnits, image_of, read_sample, sample_rng
from unimo3.texts import is_blank


class Example(NamedTuple):
    """What a sample's ``json`` contains.

    Attributes:
        identifier: of the data set.
        category: empty: none.
        texts: the captions.
        images: the number of the image that each caption is of; None: of no image.
    """

    identifier: str
    category: str
    texts: tuple[str, ...]
    images: tuple[int | None, ...]

    @property
    def num_images(self) -> int:
        """One or two."""
        return sum(image is not None for image in self.images)


class Pair(NamedTuple):
    """One of a sample's images with one of its captions, by their numbers in the sample."""

    sample: int
    image: int
    text: int


class ChoiceSamples(SampleUnits):
    """Images with captions to choose from; a unit is one image with one caption, right or wrong."""

    @property
    def units_per_shard(self) -> np.ndarray:
        """[shards] pairs of each shard."""
        return np.array([len(pairs) for pairs in pairs_of_shards(self.index)], dtype=np.int64)

    def key(self, unit: Unit) -> str:
        """The sample's key and the numbers of image and caption."""
        pair = pairs_of_shards(self.index)[unit.shard][unit.unit]
        return f"{self.index.key(unit.shard, pair.sample)}#{pair.image}-{pair.text}"

    def build(self, unit: Unit) -> Inputs:
        """The image by a call, the caption, and what scoring needs: ``example`` and ``pair``."""
        pair = pairs_of_shards(self.index)[unit.shard][unit.unit]
        members, content = read_sample(self.index, unit.shard, pair.sample)
        example = example_of(content)
        ids, mask = self._encode(example.texts[pair.text])
        number = pair.image if example.num_images > 1 else None
        rng = sample_rng(self._seed, "augment", unit.epoch, unit)
        return {
            "images": image_of(members, self._transform, rng, number),
            "input_ids": ids,
            "attention_mask": mask,
            "example": example,
            "pair": pair,
        }


@lru_cache(maxsize=2)
def pairs_of_shards(index: ShardIndex) -> list[list[Pair]]:
    """The pairs of all samples of each shard; the ``json`` of every sample is read once.

    Raises:
        DataError: a shard cannot be read.
    """
    return [
        [
            Pair(sample, image, text)
            for sample in range(num_samples)
            for image, text in np.ndindex(*_shape(index, shard, sample))
        ]
        for shard, num_samples in enumerate(index.samples_per_shard)
    ]


def _shape(index: ShardIndex, shard: int, sample: int) -> tuple[int, int]:
    """Numbers of a sample's images and captions."""
    try:
        example = example_of(content_of(index.read(shard, sample, ("json",))))
    except BadSampleError:
        return 1, 1  # its reader meets the error again
    return example.num_images, len(example.texts)


def example_of(content: dict[str, Any]) -> Example:
    """The example that a sample's ``json`` contains.

    Raises:
        BadSampleError: it contains none.
    """
    try:
        choices = [(choice["text"], choice["image"]) for choice in content["choices"]]
        example = Example(content["identifier"], content.get("category") or "", *zip(*choices, strict=True))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadSampleError(f"its json lacks a field of a choice ({error!r})") from error
    texts = (example.identifier, *example.texts)
    if not all(isinstance(text, str) and not is_blank(text) for text in texts) or not isinstance(example.category, str):
        raise BadSampleError("has an identifier, a category or a caption that is no text")
    images = sorted(image for image in example.images if image is not None)
    if any(isinstance(image, bool) for image in images) or images not in ([0], [0, 1]):
        raise BadSampleError(f"has choices of the images {list(example.images)}; one of image 0, or of 0 and 1, needed")
    if len(example.texts) < 2 or (len(images) > 1 and len(example.texts) > 2):
        raise BadSampleError(
            f"has {len(images)} images and {len(example.texts)} choices; one image and several, or two and two, needed"
        )
    return example
