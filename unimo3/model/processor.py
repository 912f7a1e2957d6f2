"""Texts and images to a model's inputs in one call, the transformers way.

Source: transformers' ProcessorMixin.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from unimo3.images import open_image, to_rgb
from unimo3.model.config import Unimo3Config
from unimo3.texts import plain


class Unimo3Processor(ProcessorMixin):
    """A tokenizer and an image processor; ``from_pretrained`` reads both from an exported folder.

    Called with `images` and `text` it gives ``pixel_values``, ``input_ids`` and ``attention_mask``.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)
        if tokenizer is not None:
            # As in training, whatever the folder has: a text's vector would depend on the others of its batch.
            tokenizer.padding_side = tokenizer.truncation_side = "right"

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See transformers. Images are resized by Pillow, as in training; torchvision's values are up to one grey value
        apart, and ``backend="torchvision"`` takes those."""
        return super().from_pretrained(*args, **({"backend": "pil"} | kwargs))

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare images, texts or both.

        Args:
            images: a PIL image, the path of an image file, an array of 8 bits ([H, W], or [H, W, C] with C of 1 to 4),
                or a list of them. Each becomes RGB as in training; see `to_rgb`.
            text: a text or a list of them, without white space and byte order marks around it as in training; padded
                to the longest and cut at the tokenizer's limit unless requested otherwise.
            kwargs: for the tokenizer and the image processor, such as ``return_tensors="pt"``.

        Raises:
            OSError, ValueError: an image is of an unknown kind, or damaged.
        """
        inputs: BatchFeature = super().__call__(
            images=_rgb_of(images), text=_plain_of(text), **({"padding": True, "truncation": True} | kwargs)
        )
        return inputs


def _rgb_of(images: Any) -> Any:
    """PIL images and paths as RGB, and arrays that are not yet RGB of 8 bits."""
    if isinstance(images, (list, tuple)):
        return [_rgb_of(image) for image in images]
    if isinstance(images, (str, Path)):
        images = open_image(images)
    elif isinstance(images, np.ndarray) and images.ndim in (2, 3):
        if images.shape[2:] == (1,):
            images = images[..., 0]
        if images.ndim == 2 or images.shape[-1] in (2, 4) or images.dtype == np.uint16:
            images = Image.fromarray(images)
    return to_rgb(images) if isinstance(images, Image.Image) else images


def _plain_of(text: Any) -> Any:
    """A text or a list of texts by the rule of training; words and pairs of the tokenizer as they are."""
    if isinstance(text, (list, tuple)):
        return [plain(entry) if isinstance(entry, str) else entry for entry in text]
    return plain(text) if isinstance(text, str) else text


AutoProcessor.register(Unimo3Config, Unimo3Processor)
