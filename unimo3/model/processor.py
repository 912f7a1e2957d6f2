"""Texts and images to a model's inputs in one call, the transformers way.

Source: transformers' ProcessorMixin.
"""

from typing import Any

from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from unimo3.model.config import Unimo3Config


class Unimo3Processor(ProcessorMixin):
    """A tokenizer and an image processor; ``from_pretrained`` reads both from an exported folder.

    Called with `images` and `text` it gives ``pixel_values``, ``input_ids`` and ``attention_mask``.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See transformers. Images are resized by Pillow, as in training; torchvision's values are up to one grey value
        apart, and ``backend="torchvision"`` takes those."""
        return super().from_pretrained(*args, **({"backend": "pil"} | kwargs))

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare images, texts or both.

        Args:
            images: a PIL image, an array, or a list of them.
            text: a text or a list of them; padded to the longest and cut at the tokenizer's limit unless requested
                otherwise.
            kwargs: for the tokenizer and the image processor, such as ``return_tensors="pt"``.
        """
        inputs: BatchFeature = super().__call__(
            images=images, text=text, **({"padding": True, "truncation": True} | kwargs)
        )
        return inputs


AutoProcessor.register(Unimo3Config, Unimo3Processor)
