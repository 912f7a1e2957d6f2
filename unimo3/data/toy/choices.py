"""Toy scenes of two objects with captions that differ in a word or in its position, for SugarCrepe and Winoground.

Source: https://github.com/RAIVNLab/sugar-crepe; https://huggingface.co/datasets/facebook/winoground.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from unimo3.data.toy.formats import Progress, save_jpeg, write_json, write_lines
from unimo3.data.toy.language import absent_name, relation
from unimo3.data.toy.scene import COLOURS, SHAPES, TEXTURES, Scene, Thing, draw_scene, render

# Streams of random numbers, next to those of the other data sets.
_SUGARCREPE, _WINOGROUND = 3, 4
_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def write_sugarcrepe(root: Path, num_images: int, size: int, seed: int, progress: Progress) -> dict[str, int]:
    """``sugarcrepe/`` with JPEGs in ``val2017/`` and a file a category, with one example an image in each."""
    records: dict[str, dict[str, Any]] = {}
    for number in progress(range(num_images), "sugarcrepe"):
        rng = np.random.default_rng((seed, _SUGARCREPE, number))
        scene = draw_two(rng)
        name = f"{number:012d}.jpg"
        save_jpeg(scene, root / "sugarcrepe" / "val2017" / name, size, rng)
        caption, negatives = choice_captions(scene, rng)
        for category, negative in negatives.items():
            record = {"filename": name, "caption": caption, "negative_caption": negative}
            records.setdefault(category, {})[str(number)] = record
    for category, of_number in records.items():
        write_json(root / "sugarcrepe" / f"{category}.json", of_number)
    return {"sugarcrepe examples": sum(map(len, records.values()))}


def write_winoground(root: Path, num_pairs: int, size: int, seed: int, progress: Progress) -> dict[str, int]:
    """``winoground/`` with JSON lines and PNG pairs: in one half the colours are swapped, in one the objects."""
    folder = root / "winoground" / "images"
    folder.mkdir(parents=True)
    records = []
    for number in progress(range(num_pairs), "winoground"):
        rng = np.random.default_rng((seed, _WINOGROUND, number))
        scene = draw_two(rng)
        tag, collapsed_tag = ("Noun", "Object") if number % 2 else ("Adjective-Color", "Relation")
        tags = {"tag": tag, "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": collapsed_tag}
        record: dict[str, Any] = {"id": number}
        for index, shown in enumerate((scene, exchanged(scene, collapsed_tag))):
            name = f"ex_{number}_img_{index}"
            render(shown, size, rng).save(folder / f"{name}.png")
            record |= {f"image_{index}": name, f"caption_{index}": sentence(*shown)}
        records.append(record | tags)
    write_lines(root / "winoground" / "examples.jsonl", records)
    return {"winoground examples": num_pairs}


def exchanged(scene: Scene, what: str) -> Scene:
    """A scene of two with its objects swapped (``Object``), or with their colours swapped (``Relation``)."""
    one, other = scene
    if what == "Object":
        return replace(other, x=one.x, y=one.y), replace(one, x=other.x, y=other.y)
    return replace(one, colour=other.colour), replace(other, colour=one.colour)


def draw_two(rng: np.random.Generator) -> Scene:
    """Two objects of different colours, so that exchanged words are wrong."""
    while True:
        scene = draw_scene(rng)
        if len(scene) == 2 and scene[0].colour != scene[1].colour:
            return scene


def sentence(one: Thing, other: Thing) -> str:
    """Where one object is from another."""
    return f"a {one.name} {relation(one, other)} a {other.name}"


def choice_captions(scene: Scene, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """A true caption, and for each category of SugarCrepe one that is wrong."""
    one, other = scene
    where, caption = relation(one, other), sentence(one, other)

    def without(options: list[str], *excluded: str) -> str:
        return str(rng.choice([option for option in options if option not in excluded]))

    colour = without(list(COLOURS), one.colour, other.colour)
    shape = without(list(SHAPES), one.shape, other.shape)
    texture = without(list(TEXTURES), one.texture)
    return caption, {
        "add_att": f"a {texture} {one.name} {where} a {other.name}",
        "add_obj": f"{caption} and a {' '.join(absent_name(scene, rng))}",
        "replace_att": f"a {colour} {one.shape} {where} a {other.name}",
        "replace_obj": f"a {one.colour} {shape} {where} a {other.name}",
        "replace_rel": f"a {one.name} {_OPPOSITES[where]} a {other.name}",
        "swap_att": f"a {other.colour} {one.shape} {where} a {one.colour} {other.shape}",
        "swap_obj": f"a {other.name} {where} a {one.name}",
    }
