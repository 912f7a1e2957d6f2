"""Clip art as pictures: SVG files with title and keywords in their metadata, drawn by librsvg.

    apt-get install openclipart-svg librsvg2-bin

Source: the Open Clip Art Library, public domain; its metadata are Dublin Core in RDF, https://www.dublincore.org.
"""

import io
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from experiments.emoji import SIZE, is_blank
from experiments.near_duplicates import FLAGS, Picture, stem

FOLDER = Path("/usr/share/openclipart/svg")
MOST_WITH_ONE_TITLE = 10
"""A title that more pictures have names their collection, not what is on them."""
MOST_BYTES = 500_000
MOST_SECONDS = 20.0
"""Of drawing one file."""

_DC = "{http://purl.org/dc/elements/1.1/}"
_ITEM = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
_ARTIST = re.compile(r"^clipart by [\w ]+ - ", re.IGNORECASE)
# Of the library's database, not of a picture.
_NO_KEYWORD = re.compile(r"hash|unsorted|.*\d.*")


class Described(NamedTuple):
    """An SVG file with what its metadata call it."""

    file: Path
    title: str
    keywords: tuple[str, ...]

    @property
    def keys(self) -> frozenset[str]:
        """What its near-duplicates have too."""
        words = {word for keyword in self.keywords for word in keyword.split()}
        names = f"clip art {stem(self.title)}", f"clip art file {stem(self.file.stem)}"
        return frozenset((*names, FLAGS) if words & {"flag", "flags"} else names)


def clip_art_pictures(folder: Path, num_jobs: int, skipped: Counter[str]) -> Iterator[Picture]:
    """Every SVG file below a folder that has a title of its own, in the order of their paths.

    Args:
        num_jobs: files drawn at a time.
        skipped: counts what is not a picture, by reason.
    """
    described = select(sorted(folder.rglob("*.svg")), skipped)
    with ThreadPoolExecutor(num_jobs) as pool:
        for one, image in zip(described, pool.map(lambda one: draw(one.file), described), strict=True):
            if image is None:
                skipped["clip art that cannot be drawn or is blank"] += 1
            else:
                words = ", ".join(one.keywords)
                yield Picture(
                    name="clip_art_" + "_".join(one.file.relative_to(folder).with_suffix("").parts),
                    image=image,
                    captions=(one.title, words) if words else (one.title,),
                    keys=one.keys,
                )


def select(files: Sequence[Path], skipped: Counter[str]) -> list[Described]:
    """The files whose title describes the picture."""
    described = []
    for file in files:
        if file.is_symlink():
            skipped["clip art that is a link to another"] += 1
        elif file.stat().st_size > MOST_BYTES:
            skipped[f"clip art of more than {MOST_BYTES:,} bytes"] += 1
        elif (one := describe(file)) is None:
            skipped["clip art without a title"] += 1
        else:
            described.append(one)
    num_with = Counter(one.title for one in described)
    titled = [one for one in described if num_with[one.title] <= MOST_WITH_ONE_TITLE]
    skipped["clip art with the title of a collection"] += len(described) - len(titled)
    return titled


def describe(file: Path) -> Described | None:
    """Title and keywords of a file's metadata; None without a title, or if the file is no XML."""
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError:
        return None
    # Publisher and creator have titles too, which come later.
    title = _ARTIST.sub("", " ".join((root.findtext(f".//{_DC}title") or "").split()))
    if not re.search(r"[^\W\d_]", title):
        return None
    items = [(item.text or "").replace("_", " ").lower().split() for item in root.iterfind(f".//{_DC}subject//{_ITEM}")]
    words = [" ".join(item) for item in items if item and not _NO_KEYWORD.fullmatch(" ".join(item))]
    return Described(file, title.replace("_", " "), tuple(dict.fromkeys(words)))


def draw(file: Path) -> Image.Image | None:
    """A square picture on white, without the page's margins; None if librsvg cannot draw the file, or it is blank."""
    side = str(2 * SIZE)
    command = ["rsvg-convert", "--width", side, "--height", side, "--keep-aspect-ratio", "--background-color", "white"]
    try:
        done = subprocess.run([*command, str(file)], capture_output=True, timeout=MOST_SECONDS, check=True)
    except subprocess.SubprocessError:
        return None
    page = Image.open(io.BytesIO(done.stdout)).convert("RGB")
    drawn = ImageOps.contain(page.crop(ImageOps.invert(page).getbbox()), (SIZE, SIZE))
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(drawn, ((SIZE - drawn.width) // 2, (SIZE - drawn.height) // 2))
    return None if is_blank(square) else square
