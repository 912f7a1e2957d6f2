"""What `loader` compares: this project's loader, webdataset's usual pipeline and a bare loop, on shards made here.

Source: webdataset's documentation for the usual pipeline.
"""

import io
import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

import unimo3  # noqa: F401  (it makes torchvision importable)
from unimo3.data.formats.record import Sample
from unimo3.data.index import ShardIndex
from unimo3.data.index_writer import table_of, write_index
from unimo3.data.loader import ReaderArgs, TrainingLoader
from unimo3.data.masking import Masking
from unimo3.data.order import SampleOrder
from unimo3.data.samples import PretrainSamples, TextEncoder
from unimo3.data.shards import ShardJob, write_shard
from unimo3.data.stored_images import ImageOptions
from unimo3.data.tokenizer import load_tokenizer, train_tokenizer
from unimo3.data.transforms import ImageTransform

OURS, WEBDATASET, BARE = "ours", "webdataset", "bare loop"
IMAGE_SIZE, TOKENS, MASKED, BATCH, PREFETCH, BUFFER, WINDOW = 288, 50, 0.15, 32, 4, 1000, 16
SAMPLES_PER_SHARD = 256
# Different pictures; samples beyond repeat them.
NUM_PICTURES = 64


def picture(number: int, width: int = 640, height: int = 480) -> bytes:
    """A JPEG with shapes of several sizes and some noise; of 640 x 480 pixels 70 to 80 kB."""
    rng = np.random.default_rng(number)

    def field(rows: int, columns: int) -> np.ndarray:
        drawn = Image.fromarray(rng.integers(0, 255, (rows, columns, 3), dtype=np.uint8))
        return np.asarray(drawn.resize((width, height), Image.Resampling.BICUBIC), dtype=float)

    mixed = 0.8 * field(12, 16) + 0.2 * field(90, 120) + rng.normal(0, 3, (height, width, 1))
    file = io.BytesIO()
    Image.fromarray(mixed.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()


def make_shards(folder: Path, num_shards: int) -> None:
    """Write shards of such pictures with two captions each, their index, and a tokenizer."""
    words = [f"word{number}" for number in range(500)]
    chooser = random.Random(0)
    for number in range(NUM_PICTURES):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    captions = [" ".join(chooser.choices(words, k=12)) for _ in range(2 * num_shards * SAMPLES_PER_SHARD)]
    train_tokenizer(captions, 1000, folder / "tokenizer")
    for shard in range(num_shards):
        first = shard * SAMPLES_PER_SHARD
        samples = tuple(
            Sample(
                f"{index:09d}",
                (folder / f"{index % NUM_PICTURES}.jpg",),
                {"image_id": index, "captions": captions[2 * index : 2 * index + 2]},
            )
            for index in range(first, first + SAMPLES_PER_SHARD)
        )
        write_shard(ShardJob("train", shard, samples), folder, ImageOptions())
    tars = sorted((folder / "train").glob("*.tar"))
    write_index(folder / "train", "pictures", "train", [table_of(path) for path in tars])


@dataclass(frozen=True)
class Setting:
    """Where the shards lie, and how images are augmented."""

    folder: Path
    augment: Any

    def index(self) -> ShardIndex:
        """The shards' index."""
        return ShardIndex(self.folder / "train")

    def samples(self) -> PretrainSamples:
        """Samples as this project reads them."""
        tokenizer = load_tokenizer(str(self.folder / "tokenizer"))
        return PretrainSamples(
            self.index(), tokenizer, TOKENS, ImageTransform(IMAGE_SIZE, self.augment), MASKED, seed=0
        )


def ours(setting: Setting, workers: int, start_step: int = 0) -> Iterator[Any]:
    """This project's batches."""
    samples = setting.samples()
    order = SampleOrder(samples.units_per_shard, 0, WINDOW)
    reader = ReaderArgs(workers, PREFETCH)
    for micro_batches in TrainingLoader([samples], order, BATCH, BATCH, 0, 1, reader, start_step):
        yield from micro_batches


def usual(setting: Setting, workers: int, decodes: bool = True) -> Iterator[Any]:
    """webdataset's batches; without decoding, single samples."""
    tokenizer = load_tokenizer(str(setting.folder / "tokenizer"))
    encode, transform = TextEncoder(tokenizer, TOKENS), ImageTransform(IMAGE_SIZE, setting.augment)
    assert isinstance(tokenizer.mask_token_id, int)
    mask = Masking(MASKED, tokenizer.mask_token_id, frozenset(tokenizer.all_special_ids), len(tokenizer))

    def build(sample: dict[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng(random.getrandbits(63))
        content = json.loads(sample["json"])
        ids, attention = encode(content["captions"][int(rng.integers(len(content["captions"])))])
        masked, labels = mask(ids, rng)
        return {
            "images": torch.tensor(transform(sample["jpg"], rng)),
            "input_ids": ids,
            "attention_mask": attention,
            "mlm_input_ids": masked,
            "mlm_labels": labels,
            "image_id": content["image_id"],
        }

    urls = [str(path) for path in sorted((setting.folder / "train").glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(BUFFER)
    if not decodes:
        yield from dataset
        return
    # Batched in the readers, as its documentation advises: fewer, larger transfers.
    batched = dataset.repeat().map(build).batched(BATCH, collation_fn=torch.utils.data.default_collate)
    yield from webdataset.WebLoader(batched, batch_size=None, num_workers=workers, prefetch_factor=PREFETCH)


class Stream:
    """A loader's batches, timed."""

    def __init__(self, batches: Iterator[Any], workers: int):
        self._batches = batches
        self._ahead = workers * (PREFETCH + 1)

    def rate(self, seconds: float) -> float:
        """Samples a second over this time, after what was read ahead while others had their turn."""
        for _ in range(self._ahead):
            next(self._batches)
        count, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            next(self._batches)
            count += BATCH
        return count / passed

    def rate_of(self, num_batches: int) -> float:
        """Samples a second over so many batches."""
        start = time.perf_counter()
        for _ in range(num_batches):
            next(self._batches)
        return num_batches * BATCH / (time.perf_counter() - start)


def _loop(orders: Connection, images: list[bytes], augment: Any) -> None:
    transform, rng = ImageTransform(IMAGE_SIZE, augment), np.random.default_rng(0)
    torch.set_num_threads(1)
    while (seconds := orders.recv()) is not None:
        count, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            transform(images[count % len(images)], rng)
            count += 1
        orders.send(count / passed)


class BareLoop:
    """Processes that decode and augment images they have in memory."""

    def __init__(self, setting: Setting, workers: int):
        images = [(setting.folder / f"{number}.jpg").read_bytes() for number in range(NUM_PICTURES)]
        context = multiprocessing.get_context("fork")
        self._ends = []
        for _ in range(workers):
            here, there = context.Pipe()
            context.Process(target=_loop, args=(there, images, setting.augment), daemon=True).start()
            self._ends.append(here)

    def rate(self, seconds: float) -> float:
        """Samples a second of all of them."""
        for end in self._ends:
            end.send(seconds)
        return sum(end.recv() for end in self._ends)
