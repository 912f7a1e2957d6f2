"""Text in pictures: the font, and what it can show.

Source: Pillow's ImageFont.
"""

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Pillow's own font, which is always there, has ASCII characters alone.
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf")


@functools.cache
def font(size: int) -> "Font":
    """A system font with many alphabets where there is one, else Pillow's."""
    from PIL import ImageFont

    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def shown(text: str, size: int, max_letters: int) -> str:
    """A line of a text as a picture shows it: white space is one space, characters without a glyph are escapes."""
    line = " ".join(text.split())
    if len(line) > max_letters:
        line = f"{line[:max_letters]} ..."
    return "".join(letter if _has_glyph(letter, size) else ascii(letter)[1:-1] for letter in line)


@functools.cache
def _has_glyph(letter: str, size: int) -> bool:
    if letter.isascii():
        return True
    if "\ud800" <= letter <= "\udfff":  # half of a surrogate pair
        return False
    missing, mask = (font(size).getmask(character) for character in ("\uffff", letter))
    return (mask.size, bytes(mask)) != (missing.size, bytes(missing))


def width_of(text: str, size: int) -> int:
    """Pixels of a line."""
    return round(font(size).getlength(text)) + 1
