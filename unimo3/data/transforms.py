"""Image bytes -> the model's pixels, the same way in training and in the exported image processor.

Source: CLIP's mean and standard deviation, arXiv 2103.00020; METER resizes to a square; RandAugment, arXiv 1909.13719.
"""

import io
import random
import warnings
from typing import Literal

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from transformers import CLIPImageProcessorPil

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

Augment = Literal["none", "randaugment"]


def image_processor(image_size: int) -> CLIPImageProcessorPil:
    """The processor that is exported with the weights: a square of `image_size` pixels, CLIP's normalisation."""
    return CLIPImageProcessorPil(
        do_resize=True,
        size={"height": image_size, "width": image_size},
        resample=Image.Resampling.BICUBIC,
        do_center_crop=False,
        do_rescale=True,
        do_normalize=True,
        image_mean=list(MEAN),
        image_std=list(STD),
        do_convert_rgb=True,
    )


class ImageTransform:
    """Decodes, resizes and normalises, and augments if asked to.

    Args:
        image_size: pixels of the square.
        augment: ``randaugment`` draws two colour or shape changes an image; it never mirrors, since captions speak of
            left and right.
    """

    def __init__(self, image_size: int, augment: Augment = "none"):
        self._size = (image_size, image_size)
        self._scale = np.float32(1 / 255) / np.asarray(STD, np.float32)
        self._shift = np.asarray(MEAN, np.float32) / np.asarray(STD, np.float32)
        self._augment = rand_augment_transform("rand-m9-n2-mstd0.5", {}) if augment == "randaugment" else None

    def __call__(self, content: bytes, rng: np.random.Generator) -> Tensor:
        """Image file -> [3, S, S] float32.

        Raises:
            OSError, ValueError, SyntaxError: it cannot be decoded, or is larger than Pillow's bomb limit.
        """
        image = decode(content).resize(self._size, Image.Resampling.BICUBIC)
        if self._augment is not None:
            # timm draws from the global generators: seed them by the sample, and put them back.
            state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
            random.seed(int(rng.integers(2**63)))
            np.random.seed(int(rng.integers(2**32)))  # noqa: NPY002
            try:
                image = self._augment(image)
            finally:
                random.setstate(state)
                np.random.set_state(numpy_state)  # noqa: NPY002
        pixels = np.asarray(image, dtype=np.float32) * self._scale - self._shift
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def decode(content: bytes) -> Image.Image:
    """Decode an image file to RGB; one beyond Pillow's pixel limit is an error, not a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(content)).convert("RGB")
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(str(error)) from error
