"""Images with all their captions, for the evaluation of retrieval.

Source: Karpathy and Fei-Fei, arXiv 1412.2306, for the five captions of COCO's and Flickr30K's images.
"""

# Shapes: T tokens a text.

import numpy as np

from unimo3.data.order import Unit
from unimo3.data.samples import Inputs, SampleUnits, image_of, read_sample
from unimo3.data.texts import BadSampleError, captions_of


class CaptionedImages(SampleUnits):
    """Images with all their captions; nothing is drawn."""

    def build(self, unit: Unit) -> Inputs:
        """The image by a call, and ``texts``, a list of ids and mask [T] for every caption."""
        members, content = read_sample(self.index, unit.shard, unit.unit)
        captions = captions_of(members, content)
        if not captions:
            raise BadSampleError("has no caption")
        return {
            "images": image_of(members, self._transform, np.random.default_rng(0)),
            "texts": [self._encode(caption) for caption in captions],
        }
