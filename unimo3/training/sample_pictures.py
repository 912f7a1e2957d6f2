"""Pictures of a few held-out samples at each evaluation: what the model predicts, and what its words read.

Source: none.
"""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from unimo3.data.loader import ReaderArgs, evaluation_batches
from unimo3.data.samples import Samples
from unimo3.distributed import World
from unimo3.engine import Engine
from unimo3.inference.explain import draw_explanation, draw_rows, read_attention, words_of
from unimo3.training.evaluation import to_device

NUM_SAMPLES = 4

Predict = Callable[[dict[str, Any]], list[str]]
"""A batch -> a line for each row; every rank calls it."""


def sample_pictures(
    engine: Engine, samples: Samples, world: World, tokenizer: Any, predict: Predict | None = None
) -> dict[str, Image.Image]:
    """Pictures of this rank's first held-out samples; every rank calls it, since ZeRO-3 gathers the weights.

    Returns:
        ``attention`` of the first sample, see `unimo3.inference.explain`; with `predict` also ``predictions``, the
        first `NUM_SAMPLES` with their images.
    """
    engine.eval()
    batches = evaluation_batches(samples, world.rank, world.size, NUM_SAMPLES, ReaderArgs(num_workers=0, prefetch=1))
    loaded, counts = next(batches)
    with torch.no_grad():
        predictions = predict(loaded) if predict else [""] * len(counts)
    ids = loaded["input_ids"].tolist()
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    batch = to_device(dict(loaded), engine.device)
    inputs = {name: batch[name][:1] for name in ("input_ids", "attention_mask", "pixel_values")}
    readings = read_attention(engine.module.model, inputs, words_of(tokenizer, ids[0]))
    pixels = batch["pixel_values"].float().cpu()
    images = pixels if pixels.dim() == 5 else pixels[:, None]  # [B, I, 3, S, S]
    lines = [[text, *filter(None, [prediction])] for text, prediction in zip(texts, predictions, strict=True)]
    pictures = {"attention": draw_explanation(images[0], readings, lines[0])}
    if predict:
        rows = [row for row, is_counted in enumerate(counts.tolist()) if is_counted]
        pictures["predictions"] = draw_rows([images[row] for row in rows], [lines[row] for row in rows])
    return pictures
