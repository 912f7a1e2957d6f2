"""Images with all their captions, for the evaluation of retrieval.

Source: Karpathy and Fei-Fei, arXiv 1412.2306, for the five captions of COCO's and Flickr30K's images.
"""

# Shapes: T tokens a text.

import logging
from functools import lru_cache

import numpy as np

from unimo3.data.index import ShardIndex
from unimo3.data.order import Unit
from unimo3.data.sample_texts import BadSampleError, captions_of, content_of
from unimo3.data.samples import Inputs, SampleUnits, identity_of, image_of, read_sample

log = logging.getLogger(__name__)


Position = tuple[int, int]
"""A sample's shard, and its number in the shard."""


class CaptionedImages(SampleUnits):
    """Images with all their captions; nothing is drawn. A unit is an image, see `samples_of_images`."""

    @property
    def units_per_shard(self) -> np.ndarray:
        """[shards] images of each shard."""
        return np.asarray([len(images) for images in samples_of_images(self.index)], dtype=np.int64)

    def key(self, unit: Unit) -> str:
        """The key of the image's first sample."""
        return self.index.key(*samples_of_images(self.index)[unit.shard][unit.unit][0])

    def build(self, unit: Unit) -> Inputs:
        """The first sample's image by a call, and ``texts``, a list of ids and mask [T] for every caption."""
        first, *others = samples_of_images(self.index)[unit.shard][unit.unit]
        members, texts = self._read(first)
        for position in others:
            try:
                texts += self._read(position)[1]
            except BadSampleError as error:
                shard, key = self.index.shards[position[0]].name, self.index.key(*position)
                raise BadSampleError(f"has the image_id of sample {key} of {shard}, which {error}") from error
        return {
            "images": image_of(members, self._transform, np.random.default_rng(0)),
            "texts": [self._encode(text) for text in texts],
        }

    def _read(self, position: Position) -> tuple[dict[str, bytes], list[str]]:
        members, content = read_sample(self.index, *position)
        identity_of(content, *position)  # an invalid one is an error
        captions = captions_of(members, content)
        if not captions:
            raise BadSampleError("has no caption")
        return members, captions


@lru_cache(maxsize=1)
def samples_of_images(index: ShardIndex) -> list[list[list[Position]]]:
    """The samples of every image: one ``image_id`` is one image, wherever its samples are stored.

    An image belongs to the shard of its first sample. The ``json`` of every sample is read once.

    Returns:
        For each shard its images, for each image its samples, in the order of the shards.

    Raises:
        DataError: a shard cannot be read.
    """
    of_identity: dict[int, list[Position]] = {}
    images: list[list[list[Position]]] = [[] for _ in index.shards]
    for shard, num_samples in enumerate(index.samples_per_shard):
        for sample in range(num_samples):
            positions = of_identity.setdefault(_identity(index, shard, sample), [])
            if not positions:
                images[shard].append(positions)
            positions.append((shard, sample))
    if len(of_identity) < index.num_samples:
        log.info("%s: %d samples are %d images by their image_id", index.source, index.num_samples, len(of_identity))
    return images


def _identity(index: ShardIndex, shard: int, sample: int) -> int:
    try:
        return identity_of(content_of(index.read(shard, sample, ("json",))), shard, sample)
    except BadSampleError:
        return identity_of({}, shard, sample)  # its reader meets the error again
