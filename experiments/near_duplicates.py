"""Pictures with captions, grouped so that near-duplicates can stay in one split.

Two pictures belong together if they have a key in common, such as the stem of their names, or if they look alike: their
thumbnails have most of their ink in common. Belonging together is transitive.

Source: the weighted Jaccard distance, Ioffe, ICDM 2010.
"""

# Shapes: N pictures, F values of a thumbnail.

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FLAGS = "flag"
"""The key of all flags, emoji or clip art."""
THUMBNAIL_SIZE = 12
"""Height and width in pixels."""
MOST_DISTANCE = 0.25
"""Pictures at most as far from each other look alike. At 0.25 these are faces of one colour with other mouths, a doctor
and a doctor of another gender, two flags with one canton; at 0.3 a thousand pictures are one group."""
_BLOCK = 512

# Words that distinguish variants of one picture: people, colours, numbers, and how a series is counted.
_VARIANT_WORDS = frozenset(
    "man men woman women person people boy boys girl girls child male female mr mrs ms mx santa "
    "red orange yellow green blue purple brown black white grey gray pink dark light medium small large big "
    "one two three four five six seven eight nine ten eleven twelve thirty "
    "left right up down and the a an of with no new old".split()
)
_SAME_WORDS = {"princess": "prince", "grandmother": "grandfather", "queen": "king", "actress": "actor"}


@dataclass(frozen=True)
class Picture:
    """A picture with captions."""

    name: str
    """What its file's name begins with."""
    image: Image.Image
    """Square, RGB, on white."""
    captions: tuple[str, ...]
    """At least one."""
    keys: frozenset[str]
    """What its near-duplicates have too."""


def stem(name: str) -> str:
    """What the names of a picture's variants have in common; the name in lower case if that is nothing.

    >>> stem("Woman firefighter"), stem("blue_heart 2"), stem("one-thirty")
    ('firefighter', 'heart', 'one-thirty')
    """
    words = re.findall(r"[^\W\d_]+", name.lower())
    return " ".join(_SAME_WORDS.get(word, word) for word in words if word not in _VARIANT_WORDS) or name.lower()


def thumbnail(image: Image.Image) -> Tensor:
    """[F], how far each colour of each pixel is from white, from 0 to 1."""
    small = image.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
    return (255 - torch.from_numpy(np.array(small)).float()).flatten() / 255


def group_numbers(pictures: Sequence[Picture]) -> list[int]:
    """The group of each picture, known by the index of its first picture."""
    parent = list(range(len(pictures)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def join(one: int, other: int) -> None:
        first, second = sorted((root(one), root(other)))
        parent[second] = first

    first_of_key: dict[str, int] = {}
    for number, picture in enumerate(pictures):
        for key in picture.keys:
            join(first_of_key.setdefault(key, number), number)
    for one, other in similar_pairs(torch.stack([thumbnail(picture.image) for picture in pictures])):
        join(one, other)
    return [root(number) for number in range(len(pictures))]


def similar_pairs(thumbnails: Tensor) -> list[tuple[int, int]]:
    """Pairs of pictures, the smaller index first, that are at most `MOST_DISTANCE` from each other.

    The distance is the ink that they do not have in common, as a fraction of the ink that either of them has.

    Args:
        thumbnails: [N, F].
    """
    ink = thumbnails.sum(1)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(thumbnails), _BLOCK):
        rows = slice(start, start + _BLOCK)
        different = torch.cdist(thumbnails[rows], thumbnails, p=1)
        either = (ink[rows, None] + ink + different) / 2
        of_block = (different <= MOST_DISTANCE * either).triu(start + 1).nonzero() + torch.tensor([start, 0])
        pairs += [(one, other) for one, other in of_block.tolist()]
    return pairs
