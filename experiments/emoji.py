"""Colour emoji of three artists as pictures, with their names and keywords from Unicode's CLDR as captions.

    apt-get install fonts-noto-color-emoji ruby-gemojione libjs-emojify unicode-cldr-core

Source: https://github.com/googlefonts/noto-emoji (SIL Open Font License); EmojiOne 3 (Creative Commons BY 4.0); the
emoji of https://github.com/Ranks/emojify.js; https://cldr.unicode.org (Unicode License), annotations in LDML,
https://unicode.org/reports/tr35.
"""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from experiments.near_duplicates import FLAGS, Picture, stem

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_ONE = Path("/usr/share/rubygems-integration/all/gems/gemojione-3.3.0")
EMOJIFY = Path("/usr/share/javascript/emojify.js/images/emoji")
_CLDR = Path("/usr/share/unicode/cldr/common")
ANNOTATIONS = (_CLDR / "annotations" / "en.xml", _CLDR / "annotationsDerived" / "en.xml")
SIZE = 136
"""Pixels of a Noto picture's side: the width of the font's bitmaps. The other artists' have 64."""
FONT_SIZE = 109
"""The one size at which the font can be drawn."""

_SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
_GENDER = re.compile("\u200d[\u2640\u2642]")
_PEOPLE = re.compile("[\U0001f466-\U0001f469\U0001f9d1\U0001f9d2]")
_FLAG = re.compile("[\U0001f1e6-\U0001f1ff\U0001f3f3\U0001f3f4]")
_COUPLES = re.compile("[\U0001f46a-\U0001f46d\U0001f48f\U0001f491]")


class Names(NamedTuple):
    """What CLDR calls each emoji, by its characters without variation selectors."""

    names: dict[str, str]
    keywords: dict[str, list[str]]


def read_annotations(files: tuple[Path, ...]) -> Names:
    """The name and the keywords of each text of LDML files."""
    cldr = Names({}, {})
    for file in files:
        for element in ElementTree.parse(file).getroot().iter("annotation"):
            text, content = without_selectors(element.attrib["cp"]), element.text or ""
            if element.get("type") == "tts":
                cldr.names[text] = content.strip()
            else:
                cldr.keywords[text] = [word.strip() for word in content.split("|")]
    return cldr


def without_selectors(text: str) -> str:
    """An emoji's characters without those that choose between its colour and its text form."""
    return text.replace("\ufe0f", "")


def noto_pictures(font: Path, cldr: Names, skipped: Counter[str]) -> Iterator[Picture]:
    """Every emoji of which a font has one bitmap.

    Args:
        font: has bitmaps of `FONT_SIZE`.
        skipped: counts what is not a picture, by reason.
    """
    letters = ImageFont.truetype(str(font), FONT_SIZE)
    return _pictures("noto", ((text, draw(text, letters)) for text in cldr.names), cldr, skipped)


def emoji_one_pictures(folder: Path, cldr: Names, skipped: Counter[str]) -> Iterator[Picture]:
    """Every emoji of gemojione's folder.

    Args:
        skipped: counts what is not a picture, by reason.
    """
    files = ((text, folder / "assets" / "png" / f"{code}.png") for _, text, code in _gemojione(folder))
    return _pictures("emoji_one", _opened(files), cldr, skipped)


def emojify_pictures(folder: Path, gemojione: Path, cldr: Names, skipped: Counter[str]) -> Iterator[Picture]:
    """Every emoji of emojify's folder that gemojione has too, by its short name.

    Args:
        gemojione: folder that has the short names.
        skipped: counts what is not a picture, by reason.
    """
    files = {text: folder / f"{name}.png" for name, text, _ in _gemojione(gemojione)}
    return _pictures("emojify", _opened(files.items()), cldr, skipped)


def _gemojione(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Each emoji's short name, its characters, and the code of its file."""
    for name, entry in json.loads((folder / "config" / "index.json").read_text()).items():
        code = entry["unicode"]
        yield name, without_selectors("".join(chr(int(part, 16)) for part in code.split("-"))), code


def _opened(files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, Image.Image | None]]:
    for text, file in files:
        if file.exists():
            image = Image.open(file).convert("RGBA")
            square = Image.new("RGBA", image.size, "white")
            square.alpha_composite(image)
            yield text, square.convert("RGB")
        else:
            yield text, None


def _pictures(
    kind: str, images: Iterable[tuple[str, Image.Image | None]], cldr: Names, skipped: Counter[str]
) -> Iterator[Picture]:
    """Those with a name; of each emoji one skin tone."""
    for text, image in images:
        if text not in cldr.names:
            skipped[f"{kind}: emoji without a name"] += 1
        elif _SKIN_TONES.search(text):
            skipped[f"{kind}: emoji with another skin tone"] += 1
        elif image is None or is_blank(image):
            skipped[f"{kind}: no picture of a named emoji"] += 1
        else:
            name = cldr.names[text]
            words = [word for word in cldr.keywords.get(text, []) if word != name]
            yield Picture(
                name=f"{kind}_" + "_".join(f"{ord(character):x}" for character in text),
                image=image,
                captions=(name, ", ".join(words)) if words else (name,),
                keys=keys_of(kind, text, name),
            )


def keys_of(kind: str, text: str, name: str) -> frozenset[str]:
    """What an emoji has in common with its near-duplicates: those of its artist, and flags of any artist."""
    return frozenset((FLAGS if _FLAG.search(text) else f"{kind} {base_of(text)}", f"{kind} {stem(name)}"))


def base_of(text: str) -> str:
    """What an emoji and its variants have in common: of all families and couples the same."""
    if len(_PEOPLE.findall(text)) > 1 or _COUPLES.search(text):
        return "family"
    return _PEOPLE.sub("\U0001f9d1", _GENDER.sub("", _SKIN_TONES.sub("", without_selectors(text))))


def draw(text: str, letters: ImageFont.FreeTypeFont) -> Image.Image | None:
    """A square picture on white; None where the font has several bitmaps for the text, or one that is too wide."""
    if not 0 < letters.getlength(text) <= SIZE:
        return None
    image = Image.new("RGB", (SIZE, SIZE), "white")
    ImageDraw.Draw(image).text((0, (SIZE - 128) // 2), text, "black", letters, embedded_color=True)
    return image


def is_blank(image: Image.Image) -> bool:
    """Whether nothing is visible on it."""
    return bool(np.ptp(np.asarray(image)) < 8)
