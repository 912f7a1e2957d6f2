"""What is asked, as a model's inputs: image files and texts, prepared as in evaluation.

Source: transformers' ProcessorMixin.
"""

# Shapes: B rows, I images of a row, T tokens of the longest text, S pixels a side.

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from unimo3.errors import DataError
from unimo3.images import decode
from unimo3.inference.exported_model import Loaded
from unimo3.texts import is_blank


class Row(NamedTuple):
    """One thing to predict: as many images as the task takes, and a text."""

    images: tuple[Path, ...]
    text: str


class Prepared(NamedTuple):
    """A row whose images are decoded and resized: `pixels` [I, 3, S, S], on the CPU."""

    pixels: Tensor
    text: str


def prepare(loaded: Loaded, row: Row) -> Prepared:
    """Read a row's images.

    Raises:
        DataError: one of them is missing, or no image.
    """
    return Prepared(torch.stack([read_pixels(loaded, path) for path in row.images]), row.text)


def read_pixels(loaded: Loaded, path: Path) -> Tensor:
    """An image file as the model reads it, [3, S, S], on the CPU.

    Raises:
        DataError: it is missing, or no image.
    """
    made: Tensor = loaded.processor(images=[_read_image(path)], return_tensors="pt")["pixel_values"]
    return made[0]


def _read_image(path: Path) -> Image.Image:
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # a ValueError of a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); name an image file") from error
    try:
        return decode(content)
    except MemoryError:
        raise  # the machine's error, not the file's
    except Exception as error:  # decoders meet damage with errors of any kind
        raise DataError(f"{path}: cannot be decoded ({error}); name an image file such as a JPEG or PNG") from error


def checked_text(text: Any, where: str) -> str:
    """A text that is not blank.

    Args:
        where: names it in errors.

    Raises:
        DataError: it is no text, or an empty one.
    """
    if not isinstance(text, str):
        raise DataError(f"{where}: {text!r}: a text is needed")
    if is_blank(text):
        raise DataError(f"{where}: '{text}': is empty; write a text")
    return text


def tokens(loaded: Loaded, texts: Sequence[str]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, [B, T], on the model's device; long texts are cut as the folder defines."""
    made = loaded.processor(text=list(texts), return_tensors="pt")
    return {name: made[name].to(loaded.device) for name in ("input_ids", "attention_mask")}
