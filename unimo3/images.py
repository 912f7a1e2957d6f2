"""The one rule by which an image becomes RGB: in training, in conversion, in prediction and in the exported processor.

Orientation is applied, alpha and transparency are ignored, 12 and 16 bits become 8, and the first frame is read.

Source: Pillow; EXIF 2.3 and XMP for the orientation.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Pillow reads others too, some of them by starting another program, such as Ghostscript for PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# Pillow's name for a JPEG with several pictures, which it finds out itself.
_JPEG_OF_SEVERAL = "MPO"

# Formats that Pillow gives as integers of 32 bits, with the values of 16.
_SIXTEEN_BITS = ("PPM", "PNG")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of these, an RGB image would be turned again, or get a background.
_APPLIED = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp", "transparency")


def open_image(file: bytes | str | Path) -> Image.Image:
    """Open an image file of one of `FORMATS` by its content; its pixels are not decoded yet.

    Args:
        file: its content, or its path.

    Raises:
        UnidentifiedImageError: it is of no such format.
        OSError, ValueError, SyntaxError: it cannot be read, or is damaged.
    """
    with _without_warnings():
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)


def is_image(path: Path) -> bool:
    """Whether a file begins as an image of one of `FORMATS` does, or cannot be read, which its decoding reports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            open_image(path).close()
        except UnidentifiedImageError:
            return False
        except Exception:  # damage, which decoders meet with errors of any kind
            return True
    return True


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, upright by its EXIF or XMP.

    - An orientation that cannot be read is ignored, as is alpha: the stored colours are used.
    - Grey of 12 or 16 bits is scaled to 8; integers whose white is unknown, and floating-point numbers, are refused.

    The result can be given to this function again, and stays as it is.

    Raises:
        ValueError: the image is of another format than `FORMATS`, or its pixels cannot be converted.
        OSError, SyntaxError: it is damaged.
    """
    if image.format not in (None, *FORMATS, _JPEG_OF_SEVERAL):
        raise ValueError(f"it is a {image.format} file; one of {', '.join(FORMATS)} is needed")
    with _without_warnings():
        image.load()  # Pillow turns a TIFF here
        turn = _UPRIGHT.get(_orientation(image))
        upright = image if turn is None else image.transpose(turn)
        if upright.mode.startswith("I"):
            upright = _grey_of_8_bits(upright, image)
        elif upright.mode == "F":
            raise ValueError("its pixels are floating-point numbers; scale them to 8 bits")
        rgb = upright.convert("RGB")
    for name in _APPLIED:
        rgb.info.pop(name, None)
    return rgb


def _grey_of_8_bits(image: Image.Image, file: Image.Image) -> Image.Image:
    """Grey of 12 or 16 bits as 8 bits; Pillow's own conversion would cut at 255 and leave white.

    Args:
        file: the image as it was opened, with the fields of a TIFF.

    Raises:
        ValueError: its pixels are signed or have 32 bits, so nobody knows which value is white.
    """
    if image.mode == "I" and file.format not in _SIXTEEN_BITS:
        raise ValueError("its pixels are integers that are signed or of more than 16 bits; scale them to 8")
    fields = getattr(file, "tag_v2", None)  # of a TIFF
    white = 65535 if fields is None else 2 ** fields[ExifTags.Base.BitsPerSample][0] - 1
    grey = np.asarray(image, dtype=np.float32) / (white / 255)
    if fields is not None and fields.get(ExifTags.Base.PhotometricInterpretation, 0) == 0:
        grey = 255 - grey  # white is zero, which Pillow knows for 8 bits alone
    return Image.fromarray(grey.round().astype(np.uint8))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings of damaged EXIF, and of palettes with transparency; that of a bomb stays."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        yield


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise  # the machine's error, not the image's
    except Exception:  # Pillow meets damaged EXIF with errors of any kind
        return None
