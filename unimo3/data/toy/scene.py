"""Scenes of a few objects, and their pictures.

Every object differs from the others of its scene in colour or shape, so "the red circle" names one object at most.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 60, 180),
    "black": (35, 35, 35),
}
SHAPES = ("circle", "square", "triangle", "cross")
TEXTURES = ("solid", "striped", "dotted")
SIZES = ("small", "large")
BACKGROUND = (236, 232, 224)
# Objects stand in the cells of a grid, a little off its centres; lengths are fractions of the picture's side.
GRID = 4
_JITTER = 0.01
_RADIUS = {"small": 0.08, "large": 0.115}
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One object; `x` and `y` are its centre as fractions of the picture, from the top left."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        """Half its extent, as a fraction of the picture."""
        return _RADIUS[self.size]

    @property
    def name(self) -> str:
        """Colour and shape, which no other object of the scene has."""
        return f"{self.colour} {self.shape}"


Scene = tuple[Thing, ...]


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw two to four objects, each in a different cell."""
    wanted = int(rng.integers(2, 5))
    # Few shapes and colours a scene, so that counts above one are common.
    shapes = rng.choice(SHAPES, size=min(len(SHAPES), int(rng.integers(2, 4))), replace=False)
    cells = rng.permutation(GRID * GRID)[:wanted]
    things: list[Thing] = []
    while len(things) < wanted:
        x, y = (
            (np.asarray(divmod(int(cells[len(things)]), GRID)) + 0.5) / GRID + rng.uniform(-_JITTER, _JITTER, 2)
        ).tolist()
        shape, colour = str(rng.choice(shapes)), str(rng.choice(list(COLOURS)))
        thing = Thing(shape, colour, str(rng.choice(TEXTURES)), str(rng.choice(SIZES)), x, y)
        if all(thing.name != other.name for other in things):
            things.append(thing)
    return tuple(things)


def render(scene: Scene, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw a scene as a `size` x `size` picture, with faint noise."""
    side = size * _SUPERSAMPLING
    pixels = np.empty((side, side, 3), dtype=np.float32)
    pixels[:] = BACKGROUND
    for thing in scene:
        # Only the square around the object is computed.
        top, left = (max(0, int((centre - thing.radius) * side) - 1) for centre in (thing.y, thing.x))
        reach = int(2 * thing.radius * side) + 4
        window = pixels[top : top + reach, left : left + reach]
        rows = np.arange(top, top + window.shape[0], dtype=np.float32)[:, None] / side - thing.y
        columns = np.arange(left, left + window.shape[1], dtype=np.float32)[None, :] / side - thing.x
        inside = _shape_mask(thing.shape, columns / thing.radius, rows / thing.radius)
        window[inside] = COLOURS[thing.colour]
        window[inside & _texture_mask(thing.texture, columns * 64, rows * 64)] = (250, 250, 250)
    picture = pixels.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING, 3).mean(axis=(1, 3))
    picture += rng.normal(0, 2, size=picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _shape_mask(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    if shape == "circle":
        return u**2 + v**2 <= 1
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.88
    if shape == "triangle":
        return (v <= 0.85) & (np.abs(u) <= (v + 1) * 0.55)
    assert shape == "cross"
    return (np.maximum(np.abs(u), np.abs(v)) <= 1) & (np.minimum(np.abs(u), np.abs(v)) <= 0.34)


def _texture_mask(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """White marks; `u` and `v` in pixels of a picture of 64."""
    if texture == "striped":
        return np.broadcast_to(np.mod(v, 4) < 1.6, np.broadcast(u, v).shape)
    if texture == "dotted":
        return (np.mod(u, 4) - 2) ** 2 + (np.mod(v, 4) - 2) ** 2 < 1.2
    return np.zeros(np.broadcast(u, v).shape, dtype=bool)
