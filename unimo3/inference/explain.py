"""Where the words of a text read an image: attention weights of the last fusion layer, level by level, as a picture.

A weight is a level's gate times the softmax over the level's image tokens, the mean over heads, as the layer uses it.
Weights show what a layer reads; they do not prove that the answer depends on it.

Source: the formula of `unimo3.kernels.cross_layer_attention`; Jain and Wallace, arXiv 1902.10186, for the limit.
"""

# Shapes: B rows, T text tokens, V image tokens (the class token first), H heads, d head width, S levels.

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from unimo3.data.transforms import MEAN, STD
from unimo3.drawing import font, shown, width_of
from unimo3.gate_map import draw_maps, level_names
from unimo3.model.attention import CrossLayerAttention

MAX_WORDS = 12

Words = list[tuple[str, Tensor]]
"""Words and the positions of their tokens."""

_CELL, _GAP, _WORD, _LINE, _IMAGE = 112, 6, 120, 22, 224
_HEAT = (214, 39, 40)
_SIZE = 15  # of the font
_LETTERS, _LINE_LETTERS = 12, 120  # shown of a word, and of a line


class Reading(NamedTuple):
    """What the words read of one image.

    Attributes:
        words: of the text, at most `MAX_WORDS`.
        weights: of the last fusion layer, [words, S, V]; they sum to 1 for each word.
        gates: of each fusion layer, the mean over heads and words of the levels that it sees.
    """

    words: list[str]
    weights: Tensor
    gates: list[list[float]]


@contextmanager
def recorded_weights(model: Any) -> Iterator[list[Tensor]]:
    """While open, each forward pass adds the weights of the text stream's layers, [B, T, H, S, V], lowest first."""
    recorded: list[Tensor] = []

    def record(layer: CrossLayerAttention, args: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        h, levels, mask = args
        q = layer.query(h).unflatten(-1, (layer.num_heads, -1)).float()
        keys = torch.stack([level[:, :, 0] for level in levels], dim=1).float()
        scores = torch.einsum("bthd,bsvhd->bthsv", q, keys) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, None], -math.inf)
        gate = output[1]
        counts = 1 / len(levels) if gate is None else gate.float()[..., None]
        recorded.append(scores.softmax(dim=-1) * counts)

    layers = [layer.cross_attention for layer in model.unimo3.fusion.text.layers]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def read_attention(model: Any, inputs: dict[str, Tensor], words: Words) -> list[Reading]:
    """Run the model on one row; what the words read of each of its images.

    Args:
        inputs: ``input_ids`` and ``attention_mask`` [1, T]; ``pixel_values`` [1, 3, S, S], or [1, I, 3, S, S].
        words: of the text, see `words_of`.
    """
    with torch.no_grad(), recorded_weights(model) as layers:
        model(**inputs)
    positions = [word_positions for _, word_positions in words]
    return [
        Reading(
            [word for word, _ in words],
            torch.stack([layers[-1][image, row].mean(dim=(0, 1)) for row in positions]).cpu(),
            [layer[image, torch.cat(positions)].sum(dim=-1).mean(dim=(0, 1)).tolist() for layer in layers],
        )
        for image in range(len(layers[0]))
    ]


def words_of(tokenizer: Any, ids: list[int], text: str | None = None) -> Words:
    """The first words of a text by its ids, at most `MAX_WORDS`; of a text without any, its first token.

    Args:
        ids: of the text, which may be truncated or padded.
        text: that has these ids. None: the text is decoded.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True) if text is None else text
    encoded = tokenizer(text, truncation=True, return_offsets_mapping=True)
    length = len(encoded["input_ids"])
    words: dict[int, list[int]] = {}
    if encoded["input_ids"] == ids[:length] and set(ids[length:]) <= {tokenizer.pad_token_id}:
        for position, word in enumerate(encoded.word_ids()):
            if word is not None:
                words.setdefault(word, []).append(position)
        spans = [[encoded["offset_mapping"][position] for position in part] for part in words.values()]
        names = [text[span[0][0] : span[-1][1]].strip() for span in spans]
    else:  # the decoded text has other ids, for example if the text was truncated inside a word
        special = set(tokenizer.all_special_ids)
        words = {position: [position] for position, number in enumerate(ids) if number not in special}
        names = [tokenizer.decode([ids[position]]).strip() for position in words]
    parts = [(name, torch.tensor(part)) for name, part in zip(names, words.values(), strict=True) if name]
    return parts[:MAX_WORDS] or [(tokenizer.decode(ids[:1]), torch.tensor([0]))]


def draw_explanation(images: Tensor, readings: list[Reading], lines: list[str]) -> Image.Image:
    """Draw each image with its gate map, and for each word and level where the last fusion layer reads.

    Args:
        images: of the row as the model reads them, [I, 3, S, S], on the CPU.
        lines: what was asked and answered, at the top.
    """
    parts = [_text_part(lines)]
    for number, (pixels, reading) in enumerate(zip(images, readings, strict=True), 1):
        image = picture_of(pixels)
        name = f"image {number}: " if len(readings) > 1 else ""
        gate_map = draw_maps(f"{name}gates, mean of heads and words", [[("words read the image", reading.gates)]])
        parts += [_next_to([image.resize((_IMAGE, _IMAGE)), gate_map]), _grid(image, reading)]
    return _below(parts)


def draw_rows(images: Sequence[Tensor], lines: Sequence[list[str]]) -> Image.Image:
    """Draw rows of images, [I, 3, S, S] each, with lines of text next to them."""
    return _below(
        [
            _next_to([*[picture_of(pixels).resize((_CELL, _CELL)) for pixels in row], _text_part(text)])
            for row, text in zip(images, lines, strict=True)
        ]
    )


def _below(parts: Sequence[Image.Image]) -> Image.Image:
    picture = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        picture.paste(part, (0, top))
        top += part.height
    return picture


def _grid(image: Image.Image, reading: Reading) -> Image.Image:
    """Words by levels; the heat of a row has one scale, so that levels can be compared."""
    num_levels = reading.weights.shape[1]
    names = level_names(num_levels, len(reading.gates))
    title = "last fusion layer: where each word reads each level, and the level's gate"
    width = max(_WORD + num_levels * (_CELL + _GAP), width_of(title, _SIZE) + 16)
    size = (width, 2 * _LINE + len(reading.words) * (_CELL + _LINE))
    grid = Image.new("RGB", size, "white")
    draw, letters = ImageDraw.Draw(grid), font(_SIZE)
    draw.text((8, 2), title, "black", letters)
    for column, name in enumerate(names):
        draw.text((_WORD + column * (_CELL + _GAP), _LINE + 2), f"level {name}", "grey", letters)
    faded = Image.blend(
        image.convert("L").convert("RGB").resize((_CELL, _CELL)), Image.new("RGB", (_CELL,) * 2, "white"), 0.3
    )
    for row, (word, weights) in enumerate(zip(reading.words, reading.weights, strict=True)):
        top = 2 * _LINE + row * (_CELL + _LINE)
        draw.text((8, top + _CELL / 2), shown(word, _SIZE, _LETTERS), "black", letters, anchor="lm")
        patches = weights[:, 1:]
        most = max(patches.max().item(), 1e-12)
        for column, (heat, gate) in enumerate(zip(patches / most, weights.sum(dim=-1).tolist(), strict=True)):
            left = _WORD + column * (_CELL + _GAP)
            side = math.isqrt(heat.numel())
            heat = heat - heat.min()  # else equal weights, which point nowhere, would cover the image
            alpha = Image.fromarray((heat.reshape(side, side) * 200).byte().numpy()).resize((_CELL, _CELL))
            cell = Image.composite(Image.new("RGB", (_CELL, _CELL), _HEAT), faded, alpha)
            grid.paste(cell, (left, top))
            draw.text((left, top + _CELL + 2), f"{gate:.2f}", "grey", letters)
    return grid


def _text_part(lines: list[str]) -> Image.Image:
    lines = [shown(line, _SIZE, _LINE_LETTERS) for line in lines]
    width = max(width_of(line, _SIZE) for line in lines)
    part = Image.new("RGB", (width + 16, _LINE * len(lines) + 12), "white")
    draw = ImageDraw.Draw(part)
    for number, line in enumerate(lines):
        draw.text((8, 6 + number * _LINE), line, "black", font(_SIZE))
    return part


def _next_to(images: list[Image.Image]) -> Image.Image:
    width, height = sum(image.width + 8 for image in images) + 8, max(image.height for image in images) + 8
    part = Image.new("RGB", (width, height), "white")
    left = 8
    for image in images:
        part.paste(image, (left, 0))
        left += image.width + 8
    return part


def picture_of(pixels: Tensor) -> Image.Image:
    """[3, S, S] as the model reads them -> a picture."""
    mean, std = torch.tensor([MEAN, STD])[:, :, None, None]  # two of [3, 1, 1]
    return Image.fromarray(((pixels * std + mean) * 255).round().clamp(0, 255).byte().movedim(0, -1).numpy())
