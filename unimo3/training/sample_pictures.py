"""Pictures of a few held-out samples at each evaluation: what the model predicts, and what its words read.

Source: none.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image

from unimo3.data.loader import ReaderArgs, evaluation_batches
from unimo3.data.samples import Samples
from unimo3.distributed import World, sum_over_ranks
from unimo3.engine import Engine
from unimo3.errors import Unimo3Error
from unimo3.inference.explain import Reading, draw_explanation, draw_rows, read_attention, words_of
from unimo3.training.evaluation import Guard, to_device

NUM_SAMPLES = 4

Predict = Callable[[dict[str, Any]], list[str]]
"""A batch -> a line for each row; every rank calls it."""

log = logging.getLogger(__name__)


def sample_pictures(
    engine: Engine, samples: Samples, world: World, tokenizer: Any, guard: Guard, predict: Predict | None = None
) -> dict[str, Image.Image]:
    """Pictures of the first held-out samples on rank 0, none on others; every rank calls it, as ZeRO-3 needs.

    What cannot be read or drawn is a warning: no run ends for a picture.

    Returns:
        ``attention`` of the first sample, see `unimo3.inference.explain`; with `predict` also ``predictions``, the
        first `NUM_SAMPLES` with their images.
    """
    engine.eval()
    pictures: dict[str, Image.Image] = {}
    for loaded, counts in guard.batches(_first_batch(samples, world)):  # no `return`: all ranks go through the guard
        is_read = torch.tensor([loaded is not None], dtype=torch.long, device=engine.device)
        if int(sum_over_ranks(is_read)[0]) < world.size:
            continue
        with torch.no_grad():
            predictions = predict(loaded) if predict else [""] * len(counts)
        batch = to_device(dict(loaded), engine.device)
        inputs = {name: batch[name][:1] for name in ("input_ids", "attention_mask", "pixel_values")}
        ids = loaded["input_ids"].tolist()
        readings = read_attention(engine.module.model, inputs, words_of(tokenizer, ids[0]))
        if world.rank == 0:
            texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
            lines = [[text, *filter(None, [prediction])] for text, prediction in zip(texts, predictions, strict=True)]
            try:
                pictures = _draw(batch["pixel_values"], counts, readings, lines, predict is not None)
            except Exception as error:  # of Pillow, of many kinds
                log.warning("the pictures of this evaluation cannot be drawn (%s: %s)", type(error).__name__, error)
    return pictures


def _first_batch(samples: Samples, world: World) -> Iterator[tuple[Any, torch.Tensor]]:
    """This rank's first rows; (None, empty) if they cannot be read."""
    reader = ReaderArgs(num_workers=0, prefetch=1)
    first: tuple[Any, torch.Tensor]
    try:
        first = next(evaluation_batches(samples, world.rank, world.size, NUM_SAMPLES, reader))
    except (Unimo3Error, OSError) as error:
        log.warning("the pictures of this evaluation have no samples (%s)", error)
        first = None, torch.empty(0)
    yield first


def _draw(
    pixel_values: torch.Tensor, counts: torch.Tensor, readings: list[Reading], lines: list[list[str]], has_rows: bool
) -> dict[str, Image.Image]:
    pixels = pixel_values.float().cpu()
    images = pixels if pixels.dim() == 5 else pixels[:, None]  # [B, I, 3, S, S]
    pictures = {"attention": draw_explanation(images[0], readings, lines[0])}
    if has_rows:
        rows = [row for row, is_counted in enumerate(counts.tolist()) if is_counted]
        pictures["predictions"] = draw_rows([images[row] for row in rows], [lines[row] for row in rows])
    return pictures
