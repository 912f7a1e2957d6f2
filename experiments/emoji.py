"""Colour emoji as pictures: drawn from a font, with their names and keywords from Unicode's CLDR as captions.

    apt-get install fonts-noto-color-emoji unicode-cldr-core

Source: https://github.com/googlefonts/noto-emoji (SIL Open Font License); https://cldr.unicode.org (Unicode License),
annotations in LDML, https://unicode.org/reports/tr35.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from experiments.near_duplicates import FLAGS, Picture, stem

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
_CLDR = Path("/usr/share/unicode/cldr/common")
ANNOTATIONS = (_CLDR / "annotations" / "en.xml", _CLDR / "annotationsDerived" / "en.xml")
SIZE = 136
"""Pixels of a picture's side: the width of the font's bitmaps."""
FONT_SIZE = 109
"""The one size at which the font can be drawn."""

_SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
_GENDER = re.compile("\u200d[\u2640\u2642]")
_PEOPLE = re.compile("[\U0001f466-\U0001f469\U0001f9d1\U0001f9d2]")
_FLAG = re.compile("[\U0001f1e6-\U0001f1ff\U0001f3f3\U0001f3f4]")
_COUPLES = re.compile("[\U0001f46a-\U0001f46d\U0001f48f\U0001f491]")


def emoji_pictures(font: Path, annotations: tuple[Path, ...], skipped: Counter[str]) -> Iterator[Picture]:
    """Every emoji that the font has as one bitmap, by its code points; one skin tone of each.

    Args:
        font: a font of bitmaps with `FONT_SIZE`.
        annotations: LDML files with names and keywords.
        skipped: counts what is not a picture, by reason.
    """
    letters = ImageFont.truetype(str(font), FONT_SIZE)
    names, keywords = read_annotations(annotations)
    for text, name in names.items():
        if _SKIN_TONES.search(text):
            skipped["emoji with another skin tone"] += 1
            continue
        image = draw(text, letters)
        if image is None:
            skipped["symbol that the emoji font does not have"] += 1
            continue
        words = [word for word in keywords.get(text, []) if word != name]
        yield Picture(
            name="emoji_" + "_".join(f"{ord(character):x}" for character in text),
            image=image,
            captions=(name, ", ".join(words)) if words else (name,),
            keys=keys_of(text, name),
        )


def read_annotations(files: tuple[Path, ...]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The name and the keywords of each text of LDML files."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for file in files:
        for element in ElementTree.parse(file).getroot().iter("annotation"):
            text, content = element.attrib["cp"], element.text or ""
            if element.get("type") == "tts":
                names[text] = content.strip()
            else:
                keywords[text] = [word.strip() for word in content.split("|")]
    return names, keywords


def keys_of(text: str, name: str) -> frozenset[str]:
    """What an emoji's near-duplicates have too."""
    return frozenset((FLAGS if _FLAG.search(text) else f"emoji {base_of(text)}", f"emoji {stem(name)}"))


def base_of(text: str) -> str:
    """What an emoji and its variants have in common: of all families and couples the same."""
    if len(_PEOPLE.findall(text)) > 1 or _COUPLES.search(text):
        return "family"
    return _PEOPLE.sub("\U0001f9d1", _GENDER.sub("", _SKIN_TONES.sub("", text.replace("\ufe0f", ""))))


def draw(text: str, letters: ImageFont.FreeTypeFont) -> Image.Image | None:
    """A square picture on white; None where the font has no bitmap for the text, or several."""
    if not 0 < letters.getlength(text) <= SIZE:
        return None
    image = Image.new("RGB", (SIZE, SIZE), "white")
    ImageDraw.Draw(image).text((0, (SIZE - 128) // 2), text, "black", letters, embedded_color=True)
    return None if is_blank(image) else image


def is_blank(image: Image.Image) -> bool:
    """Whether nothing is visible on it."""
    return bool(np.ptp(np.asarray(image)) < 8)
