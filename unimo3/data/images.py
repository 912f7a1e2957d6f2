"""The content of image files -> RGB.

Source: Pillow.
"""

from PIL import Image, UnidentifiedImageError

from unimo3.images import open_image, to_rgb


def decode(content: bytes) -> Image.Image:
    """Decode an image file to RGB; see `to_rgb`.

    Raises:
        OSError, ValueError, SyntaxError: it is no image, is cut off, or is larger than Pillow's bomb limit.
    """
    try:
        return to_rgb(open_image(content))
    except UnidentifiedImageError as error:
        # Pillow's message contains the address of an object.
        raise ValueError("it is no image of a known kind") from error
