"""Texts and images to a model's inputs in one call, the transformers way.

Source: transformers' ProcessorMixin.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from unimo3.images import image_of_array, open_image, to_rgb
from unimo3.model.config import Unimo3Config
from unimo3.texts import plain, read_texts_as_in_training


class Unimo3Processor(ProcessorMixin):
    """A tokenizer and an image processor; ``from_pretrained`` reads both from an exported folder.

    Called with `images` and `text` it gives ``pixel_values``, ``input_ids`` and ``attention_mask``.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)
        if tokenizer is not None:
            read_texts_as_in_training(tokenizer)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See transformers. Images are resized by Pillow, as in training; torchvision's values are up to one grey value
        apart, and ``backend="torchvision"`` takes those."""
        return super().from_pretrained(*args, **({"backend": "pil"} | kwargs))

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare images, texts or both.

        Args:
            images: a PIL image, the path of an image file, an array or a tensor of an image or of a batch, or a list of
                them. Each becomes RGB as in training; see `to_rgb`, and `image_of_array` for shapes and values.
                With ``do_rescale=False`` they are arrays of floating-point RGB from 0 to 1.
            text: a text or a list of them, without white space and byte order marks around it as in training; padded
                to the longest and cut at the tokenizer's limit unless requested otherwise.
            kwargs: for the tokenizer and the image processor, such as ``return_tensors="pt"``.

        Raises:
            OSError, ValueError: an image is of an unknown kind, damaged, or larger than Pillow's pixel limit; or has 8
                bits, with ``do_rescale=False``.
        """
        options = (kwargs.get("images_kwargs") or {}) | kwargs
        is_scaled = not options.get("do_rescale", getattr(self.image_processor, "do_rescale", True))
        prepared = {"images": _rgb_of(images, options.get("input_data_format"), is_scaled), "text": _plain_of(text)}
        of_texts = kwargs.get("text_kwargs") or {}
        defaults = {name: True for name in ("padding", "truncation") if name not in of_texts}
        inputs: BatchFeature = super().__call__(**prepared, **(defaults | kwargs))
        return inputs


def _rgb_of(images: Any, layout: str | None, is_scaled: bool) -> Any:
    """PIL images, paths and arrays as RGB.

    Args:
        layout: of arrays.
        is_scaled: whether floating-point numbers from 0 to 1 are expected; these stay as they are.
    """
    if isinstance(images, Tensor):
        images = images.numpy(force=True)
    if isinstance(images, (list, tuple)) or (isinstance(images, np.ndarray) and images.ndim > 3):
        return [_rgb_of(image, layout, is_scaled) for image in images]
    is_float = isinstance(images, np.ndarray) and images.dtype.kind == "f"
    if is_scaled and images is not None and not is_float:
        raise ValueError("do_rescale=False: floating-point RGB from 0 to 1 is needed; leave it out for 8-bit images")
    if isinstance(images, (str, Path)):
        images = open_image(images)
    elif isinstance(images, np.ndarray) and is_scaled:
        if images.ndim != 3 or 3 not in (images.shape[0], images.shape[-1]):
            raise ValueError(f"an array of shape {list(images.shape)} of {images.dtype}: three channels are needed")
    elif isinstance(images, np.ndarray):
        images = image_of_array(images, layout)
    return to_rgb(images) if isinstance(images, Image.Image) else images


def _plain_of(text: Any) -> Any:
    """A text or a list of texts by the rule of training; other values as they are, for the tokenizer to refuse."""
    if isinstance(text, (list, tuple)):
        return [plain(entry) if isinstance(entry, str) else entry for entry in text]
    return plain(text) if isinstance(text, str) else text


AutoProcessor.register(Unimo3Config, Unimo3Processor)
