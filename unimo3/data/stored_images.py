"""An image file -> the bytes that a shard has of it: as they are, or scaled and encoded again as JPEG.

Source: none.
"""

import errno
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from unimo3.errors import DataError
from unimo3.images import decode, open_image

# What the loader reads; other kinds are encoded again.
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "MPO": "jpg"}
# Read errors that are caused by the file; others, such as EIO, may be gone at the next try.
_OF_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class ImageOptions:
    """How images are stored.

    Attributes:
        max_side: pixels; larger images are scaled to it by their longer side and encoded again as JPEG. 0: JPEG, PNG
            and WebP as they are, other kinds as JPEG.
        quality: of the JPEG, 1 to 95.
    """

    max_side: int = 0
    quality: int = 95


class UnusableImageError(Exception):
    """A file is missing or no image that can be decoded.

    Args:
        path: of the file.
        reason: why, without the path.
    """

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


def read_image(path: Path, options: ImageOptions) -> tuple[str, bytes]:
    """A file's extension and bytes, after decoding it once; scaled and encoded again if `options` ask for it.

    Raises:
        UnusableImageError: it is missing, or no image that can be decoded and stored.
        DataError: it cannot be read now, for a reason of the machine's.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # a ValueError of a name that no file can have
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, OSError) and error.errno not in _OF_THE_FILE:
            raise DataError(
                f"{path}: cannot be read ({reason}); fix the cause and start the same command again"
            ) from error
        raise UnusableImageError(path, f"cannot be read ({reason})") from error
    try:
        image = decode(content)
    except MemoryError:
        raise  # the machine's error, not the image's
    except Exception as error:  # decoders meet damage with errors of any kind
        raise UnusableImageError(path, f"cannot be decoded ({error})") from error
    # By its content: names have other endings, or none.
    extension = _EXTENSIONS.get(str(open_image(content).format))
    longer = max(image.size)
    is_large = bool(options.max_side) and longer > options.max_side
    if extension and not is_large:
        return extension, content
    if is_large:
        width, height = (max(1, round(side * options.max_side / longer)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    image.info.pop("comment", None)  # Pillow would store it, if it is short enough
    encoded = io.BytesIO()
    try:
        image.save(encoded, "JPEG", quality=options.quality)
    except (OSError, ValueError) as error:
        width, height = image.size
        raise UnusableImageError(
            path, f"its {width} x {height} pixels cannot be encoded as JPEG ({error}); use --max-side"
        ) from error
    return "jpg", encoded.getvalue()
