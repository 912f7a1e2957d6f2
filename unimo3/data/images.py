"""Image files -> RGB.

Source: Pillow; EXIF 2.3 for the orientation.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_ORIENTATION = 0x0112  # EXIF's tag


def decode(content: bytes) -> Image.Image:
    """Decode an image file to RGB, upright by its EXIF, the first frame of several.

    Raises:
        OSError, ValueError, SyntaxError: it is no image, is cut off, or is larger than Pillow's bomb limit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # Of palettes whose transparency is cut, which RGB has no use for.
        warnings.filterwarnings("ignore", message="Palette images with Transparency")
        try:
            image: Image.Image = Image.open(io.BytesIO(content))
            # Of a file without EXIF it is a copy; most have none.
            upright = ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
            if upright.mode.startswith("I"):
                # 16 bits a pixel; Pillow's own conversion would cut at 255 and leave white.
                grey = np.asarray(upright, dtype=np.float32) / 257
                if grey.min() < 0 or grey.max() > 255:
                    raise ValueError("its pixels have more than 16 bits")
                upright = Image.fromarray(grey.round().astype(np.uint8))
            elif upright.mode == "F":
                raise ValueError("its pixels are floating-point numbers")
            return upright.convert("RGB")
        except UnidentifiedImageError as error:
            # Pillow's message contains the address of an object.
            raise ValueError("it is no image of a known kind") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(str(error)) from error
