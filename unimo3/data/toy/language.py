"""Captions, questions and statements about a scene.

Questions have three granularities: fine (texture or colour of one small object), object (shape, colour, count,
existence) and scene (relations, layout). The answer is drawn first where that balances it, so a question's text
has little information about its answer.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from unimo3.data.toy.scene import COLOURS, GRID, SHAPES, TEXTURES, Scene, Thing

_NUMBER_WORDS = ("no", "one", "two", "three", "four")


@dataclass(frozen=True)
class Question:
    """A question with its true answer; `options` are the answers somebody might mistake for it."""

    text: str
    answer: str
    kind: str
    granularity: str
    answer_type: str
    options: tuple[str, ...]


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Five captions, each from another point of view."""
    first, second = (scene[i] for i in rng.permutation(len(scene))[:2])
    shuffled = [scene[i] for i in rng.permutation(len(scene))]
    leftmost = min(scene, key=lambda thing: thing.x)
    return [
        f"{_full(first)} {relation(first, second)} {_full(second)}",
        f"{_NUMBER_WORDS[len(scene)]} objects : " + " , ".join(f"a {thing.name}" for thing in shuffled),
        f"{_counts(scene)} in the picture",
        " , ".join(f"the {thing.name} is {thing.size} and {thing.texture}" for thing in (first, second)),
        f"the object on the far left is a {leftmost.texture} {leftmost.name}",
    ]


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Four to six questions, every granularity among them where the scene allows."""
    asked = [make(scene, rng) for make in _MAKERS]
    return [question for question in asked if question is not None]


def statement(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A sentence and whether the scene entails it: ``entailment``, ``neutral`` or ``contradiction``."""
    label = str(rng.choice(["entailment", "neutral", "contradiction"]))
    thing = scene[rng.integers(len(scene))]
    if label == "entailment":
        return f"there is a {thing.name}", label
    if label == "neutral":
        return f"somebody likes the {thing.name}", label
    colour, shape = absent_name(scene, rng)
    return f"there is a {colour} {shape}", label


def pair_statement(left: Scene, right: Scene, rng: np.random.Generator) -> tuple[str, bool]:
    """A sentence about two pictures and whether it is true, half of the time each."""
    truth = bool(rng.integers(2))
    side, scene = (("left", left), ("right", right))[rng.integers(2)]
    if rng.integers(2):
        number = len(left) + len(right)
        stated = number if truth else number + int(rng.choice([-1, 1]))
        return f"there are {stated} objects in total", truth
    if truth:
        return f"the {side} image has a {scene[rng.integers(len(scene))].name}", True
    colour, shape = absent_name(scene, rng)
    return f"the {side} image has a {colour} {shape}", False


def _full(thing: Thing) -> str:
    return f"a {thing.size} {thing.texture} {thing.name}"


def relation(one: Thing, other: Thing) -> str:
    """Where one object is from another, by the larger of both distances."""
    dx, dy = one.x - other.x, one.y - other.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _counts(scene: Scene) -> str:
    counts = Counter(thing.shape for thing in scene)
    parts = [f"{_NUMBER_WORDS[count]} {_plural(shape, count)}" for shape, count in sorted(counts.items())]
    return " and ".join(parts)


def _plural(shape: str, count: int) -> str:
    return shape if count == 1 else {"cross": "crosses"}.get(shape, f"{shape}s")


def absent_name(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Colour and shape of an object that the scene lacks."""
    present = {(thing.colour, thing.shape) for thing in scene}
    absent = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in present]
    return absent[rng.integers(len(absent))]


def _unique(scene: Scene, key: Callable[[Thing], object]) -> list[Thing]:
    counts = Counter(key(thing) for thing in scene)
    return [thing for thing in scene if counts[key(thing)] == 1]


def _texture_of_small(scene: Scene, rng: np.random.Generator) -> Question | None:
    small = [thing for thing in scene if thing.size == "small"]
    if not small:
        return None
    thing = small[rng.integers(len(small))]
    text = f"what is the texture of the small {thing.name}?"
    return Question(text, thing.texture, "what is the texture", "fine", "other", TEXTURES)


def _colour_of_small(scene: Scene, rng: np.random.Generator) -> Question | None:
    small = [thing for thing in _unique(scene, lambda t: (t.size, t.shape)) if thing.size == "small"]
    if not small:
        return None
    thing = small[rng.integers(len(small))]
    text = f"what color is the small {thing.shape}?"
    return Question(text, thing.colour, "what color", "fine", "other", tuple(COLOURS))


def _shape_of_colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    things = _unique(scene, lambda thing: thing.colour)
    if not things:
        return None
    thing = things[rng.integers(len(things))]
    return Question(f"what shape is {thing.colour}?", thing.shape, "what shape", "object", "other", SHAPES)


def _count_or_existence(scene: Scene, rng: np.random.Generator) -> Question:
    if rng.integers(2):
        counts = {shape: sum(thing.shape == shape for thing in scene) for shape in SHAPES}
        number = int(rng.choice(sorted(set(counts.values()))))
        shape = str(rng.choice([shape for shape in SHAPES if counts[shape] == number]))
        text = f"how many {_plural(shape, 2)} are there?"
        return Question(text, str(number), "how many", "object", "number", ("0", "1", "2", "3", "4"))
    if rng.integers(2):
        thing = scene[rng.integers(len(scene))]
        colour, shape, answer = thing.colour, thing.shape, "yes"
    else:
        colour, shape = absent_name(scene, rng)
        answer = "no"
    return Question(f"is there a {colour} {shape}?", answer, "is there a", "object", "yes/no", ("yes", "no"))


def _relation_of_two(scene: Scene, rng: np.random.Generator) -> Question:
    one, other = (scene[i] for i in rng.permutation(len(scene))[:2])
    words = ("left of", "right of") if relation(one, other) in ("left of", "right of") else ("above", "below")
    word = words[rng.integers(2)]
    answer = "yes" if word == relation(one, other) else "no"
    text = f"is the {one.name} {word} the {other.name}?"
    return Question(text, answer, "is the", "scene", "yes/no", ("yes", "no"))


def _colour_at_an_end(scene: Scene, rng: np.random.Generator) -> Question | None:
    ends: tuple[tuple[str, Callable[[Thing], float]], ...] = (
        ("on the far left", lambda thing: thing.x),
        ("on the far right", lambda thing: -thing.x),
        ("at the top", lambda thing: thing.y),
        ("at the bottom", lambda thing: -thing.y),
    )
    where, position = ends[rng.integers(len(ends))]
    thing, next_one = sorted(scene, key=position)[:2]
    if position(next_one) - position(thing) < 0.5 / GRID:
        return None  # two share the outermost row or column
    return Question(f"what color is the object {where}?", thing.colour, "what color", "scene", "other", tuple(COLOURS))


_MAKERS: tuple[Callable[[Scene, np.random.Generator], Question | None], ...] = (
    _texture_of_small,
    _colour_of_small,
    _shape_of_colour,
    _count_or_existence,
    _relation_of_two,
    _colour_at_an_end,
)
