"""Where a reader's time goes, part by part, and what the reduced decode of large photos saves."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch

from benchmarks.loader_contestants import BATCH, IMAGE_SIZE, WINDOW, Setting, picture
from unimo3.data.loader import BatchReader
from unimo3.data.order import SampleOrder
from unimo3.data.transforms import ImageTransform

_NUM_BATCHES = 4
PHOTO_SIZES = ((1024, 768), (2048, 1536))
IMAGE_SIZES = (224, 288, 384)


def measure_parts(setting: Setting, rounds: int) -> dict[str, float]:
    """Seconds a batch, medians: of a complete batch in this process, and of its parts alone."""
    samples = setting.samples()
    order = SampleOrder(samples.units_per_shard, 0, WINDOW)
    positions = range(_NUM_BATCHES * BATCH)
    units = [order[position] for position in positions]
    reader = BatchReader([samples], order, replaces=True)
    transform, rng = ImageTransform(IMAGE_SIZE, setting.augment), np.random.default_rng(0)
    images = [samples.index.read(unit.shard, unit.unit, ("jpg",))["jpg"] for unit in units]
    pixels = transform(images[0], rng)

    def complete() -> None:
        for start in range(0, len(units), BATCH):
            reader.__getitems__(list(positions[start : start + BATCH]))

    def decode() -> None:
        for image in images:
            transform(image, rng)

    def read() -> None:
        for unit in units:
            samples.index.read(unit.shard, unit.unit, ("jpg",))

    def text() -> None:
        for unit in units:
            samples.build(unit)

    def memory() -> None:
        for _ in range(_NUM_BATCHES):
            storage = torch.UntypedStorage._new_shared(BATCH * pixels.size)
            rows = torch.empty(0, dtype=torch.uint8).set_(storage).view(BATCH, *pixels.shape).numpy()
            for row in rows:
                row[:] = pixels

    parts: dict[str, Callable[[], None]] = {
        "decoding and resizing, images in memory": decode,
        "reading the images' bytes": read,
        "captions: reading, tokens, masks": text,
        "new pages of shared memory, and the copy into them": memory,
        "complete batches": complete,
    }
    seconds = _medians(parts, rounds)
    return {name: value / _NUM_BATCHES for name, value in seconds.items()}


def measure_photos(rounds: int, num_photos: int) -> list[tuple[str, int, float, float, float]]:
    """Rows: a photo's size, the square's pixels, the reduced decode's speed-up, its mean and its largest difference."""
    rows = []
    for width, height in PHOTO_SIZES:
        photos = [picture(number, width, height) for number in range(num_photos)]
        for size in IMAGE_SIZES:
            full, reduced = (
                partial(_transformed, ImageTransform(size, reduced_decode=is_reduced), photos)
                for is_reduced in (False, True)
            )
            seconds = _medians({"full": full, "reduced": reduced}, rounds)
            difference = np.abs(full().astype(int) - reduced())
            rows.append(
                (
                    f"{width} x {height}",
                    size,
                    seconds["full"] / seconds["reduced"],
                    float(difference.mean()),
                    float(difference.max()),
                )
            )
    return rows


def _transformed(transform: ImageTransform, photos: list[bytes]) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([transform(photo, rng) for photo in photos])


def _medians(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each; all take their turn in every round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}
