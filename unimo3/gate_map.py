"""Gate maps: how much each level counts in each fusion layer, as a labelled picture.

Source: none.
"""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimo3.drawing import font, width_of

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

Gates = Sequence[Sequence[Sequence[float]]]
"""[gated layers, heads, levels], zero for levels that a layer does not see, as `unimo3.model.fusion.mean_gates`."""

_CELL, _GAP, _LEFT, _TOP, _BOTTOM = 56, 24, 76, 56, 44
_BAR, _BAR_LABEL = 14, 40
# White at 0 to dark blue at 1.
_DARK, _NOT_FINITE = (8, 48, 107), (200, 200, 200)
_FOOTER = "columns: levels of the other modality"
_SIZE = 15  # of the font
_COLUMNS = 4


def gates_of(record: dict[str, Any], name: str) -> Gates | None:
    """The gates of a record of ``metrics.jsonl``; None if it has none, or something else by this name."""
    import numpy as np

    try:
        gates = np.asarray(record.get(name), dtype=float)
    except (TypeError, ValueError):  # a text, or rows of different lengths
        return None
    return gates.tolist() if gates.ndim == 3 and gates.size else None


def gates_by_layer(gates: Gates, num_tower_levels: int) -> list[list[list[float]]]:
    """For each fusion layer and head the gates of the levels that the layer sees, its partner's last.

    A layer without a gate sees its partner alone, which then counts fully.
    """
    num_heads = len(gates[0])
    # Without tower levels the first layer sees one level, and has no gate.
    ungated = [] if num_tower_levels else [[[1.0]] * num_heads]
    return ungated + [
        [list(head[: num_tower_levels + layer]) for head in heads]
        for layer, heads in enumerate(gates, 1 + len(ungated))
    ]


def mean_over_heads(layers: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """[layers, heads, levels] -> [layers, levels]."""
    return [[sum(level) / len(level) for level in zip(*heads, strict=True)] for heads in layers]


def level_names(num_levels: int, num_layers: int) -> list[str]:
    """t1, t2, ... for a tower's layers, then the fusion encoder's levels from 0; of an in-layer model the partner."""
    if num_levels < num_layers:
        return ["partner"]
    return [f"t{level + 1}" for level in range(num_levels - num_layers)] + [str(level) for level in range(num_layers)]


def num_tower_levels(run: Path) -> int:
    """How many tower layers the model of a run's folder reads as levels; 0 for a run without a model."""
    path = run / "model" / "config.json"
    try:
        return int(json.loads(path.read_text())["unimodal_levels"])
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: cannot be read (%s: %s); gate maps name no tower layers", path, type(error).__name__, error)
        return 0


def draw_gate_map(gates: Gates, num_tower_levels: int, title: str, by_head: bool = False) -> "Image.Image":
    """A picture of one stream's gates: the mean of the heads, and with `by_head` a map for each head after it."""
    layers = gates_by_layer(gates, num_tower_levels)
    maps = [("mean of the heads", mean_over_heads(layers))]
    if by_head:
        num_heads = len(layers[0])
        maps += [(f"head {head}", [heads[head] for heads in layers]) for head in range(num_heads)]
    return draw_maps(title, [maps[start : start + _COLUMNS] for start in range(0, len(maps), _COLUMNS)])


def draw_maps(title: str, grid: Sequence[Sequence[tuple[str, Sequence[Sequence[float]]]]]) -> "Image.Image":
    """Draw titled maps in rows and columns, with one colour bar.

    Args:
        grid: rows of (title, [layers, levels that each sees]); all have equally many layers.
    """
    from PIL import Image, ImageDraw

    num_layers = len(grid[0][0][1])
    num_levels = max(len(layers[-1]) for row in grid for _, layers in row)
    names = [name for row in grid for name, _ in row]
    step_x = _LEFT + max(num_levels * _CELL, *(width_of(name, _SIZE) + _GAP for name in names))
    step_y = num_layers * _CELL + _TOP
    width = max(map(len, grid)) * step_x + _GAP + _BAR + _BAR_LABEL
    width = max(width, *(width_of(line, _SIZE) + 16 for line in (title, _FOOTER)))
    image = Image.new("RGB", (width, len(grid) * step_y + _BOTTOM), "white")
    draw, letters = ImageDraw.Draw(image), font(_SIZE)
    draw.text((8, 6), title, "black", letters)
    for row, maps in enumerate(grid):
        for column, (name, layers) in enumerate(maps):
            left, top = column * step_x + _LEFT, row * step_y + _TOP
            draw.text((left, top - 6), name, "black", letters, anchor="ls")
            for number, label in enumerate(level_names(len(layers[-1]), num_layers)):
                draw.text(
                    (left + (number + 0.5) * _CELL, top + num_layers * _CELL), label, "grey", letters, anchor="mt"
                )
            for number, levels in enumerate(layers):
                draw.text((left - 6, top + (number + 0.5) * _CELL), f"layer {number + 1}", "grey", letters, anchor="rm")
                for level, gate in enumerate(levels):
                    x, y = left + level * _CELL, top + number * _CELL
                    draw.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), fill=colour_of(gate))
                    ink = "white" if gate > 0.5 else "black"
                    draw.text((x + _CELL / 2, y + _CELL / 2), f"{gate:.2f}", ink, letters, anchor="mm")
    draw.text((8, image.height - 6), _FOOTER, "grey", letters, anchor="ls")
    left, height = width - _BAR - _BAR_LABEL, num_layers * _CELL
    for offset in range(height):
        draw.line((left, _TOP + offset, left + _BAR, _TOP + offset), colour_of(1 - offset / (height - 1)))
    for gate in (0.0, 0.5, 1.0):
        draw.text((left + _BAR + 6, _TOP + (1 - gate) * height), f"{gate:g}", "grey", letters, anchor="lm")
    return image


def colour_of(gate: float) -> tuple[int, int, int]:
    """The colour of a weight from 0 to 1, and of one that is not finite."""
    if not math.isfinite(gate):
        return _NOT_FINITE
    red, green, blue = (round(255 + (end - 255) * gate) for end in _DARK)
    return red, green, blue
