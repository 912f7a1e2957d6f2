"""Image bytes -> the model's pixels, the same way in training and in the exported image processor.

Reader processes make 8-bit values, a quarter of the bytes to hand over; `normalize` runs where the model does.

Source: CLIP's mean and standard deviation, arXiv 2103.00020; METER resizes to a square; RandAugment, arXiv 1909.13719.
"""

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from transformers import CLIPImageProcessorPil

from unimo3.data.args import Augment
from unimo3.images import decode

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Of a random crop, width to height; timm's default.
_NARROWEST = 3 / 4
# The least scale down that the bicubic resize still makes after a reduced decode.
_OVERSAMPLING = 2.0


def image_processor(image_size: int) -> CLIPImageProcessorPil:
    """The processor that is exported with the weights: a square of `image_size` pixels, CLIP's normalization."""
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


def normalize(images: Tensor) -> Tensor:
    """[..., S, S, 3] uint8 -> the model's [..., 3, S, S] float32, as the exported processor makes them."""
    mean, std = torch.tensor([MEAN, STD], dtype=torch.float32, device=images.device)
    scale, shift = 1 / 255 / std, mean / std
    return (images.float() * scale - shift).movedim(-1, -3).contiguous()


class ImageTransform:
    """Decodes and resizes, and augments if asked to.

    Args:
        image_size: pixels of the square.
        augment: ``randaugment`` draws two colour or shape changes an image; it never mirrors, since captions speak of
            left and right.
        crop_scale: least fraction of an image's area in a random crop, between 3:4 and 4:3 in shape; 1: no crop.
        reduced_decode: whether JPEGs with four times the height and width that are needed, or more, are decoded at a
            reduced size, never below twice what is needed: a photo's pixels differ by less than half a grey level on
            average.
    """

    def __init__(
        self, image_size: int, augment: Augment = "none", crop_scale: float = 1.0, reduced_decode: bool = False
    ):
        self._size = (image_size, image_size)
        self._resize: Callable[[Image.Image], Image.Image] = self._resize_uncropped
        if crop_scale < 1:
            self._resize = RandomResizedCropAndInterpolation(image_size, (crop_scale, 1.0), interpolation="bicubic")
        self._augment = rand_augment_transform("rand-m9-n2-mstd0.5", {}) if augment == "randaugment" else None
        # Of the smallest crop's shorter side.
        needed = image_size / math.sqrt(crop_scale * _NARROWEST if crop_scale < 1 else 1)
        self._enough_pixels = math.ceil(_OVERSAMPLING * needed) if reduced_decode else 0
        self._draws = crop_scale < 1 or self._augment is not None

    def __call__(self, content: bytes, rng: np.random.Generator) -> np.ndarray:
        """Image file -> [S, S, 3] uint8, which is not to be written to.

        Raises:
            OSError, ValueError, SyntaxError: it cannot be decoded, or is larger than Pillow's bomb limit.
        """
        image = decode(content, self._enough_pixels)
        if self._draws:
            # timm draws from the global generators: seed them by the sample, and put them back.
            state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
            random.seed(int(rng.integers(2**63)))
            np.random.seed(int(rng.integers(2**32)))  # noqa: NPY002
            try:
                image = self._resize(image)
                if self._augment is not None:
                    image = self._augment(image)
            finally:
                random.setstate(state)
                np.random.set_state(numpy_state)  # noqa: NPY002
        else:
            image = self._resize(image)
        return np.asarray(image)

    def _resize_uncropped(self, image: Image.Image) -> Image.Image:
        return image.resize(self._size, Image.Resampling.BICUBIC)
