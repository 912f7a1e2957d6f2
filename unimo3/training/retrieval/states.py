"""Runs a held-out set through the towers, each image and text once, and caches their states on the host.

Batches are the same at any number of ranks, which take them in turn: the states of a batch do not depend on the number
of ranks. A rank caches states of its own images and of all texts. States beyond `cache_gb` are computed again.

Source: the two-tower part of ALBEF, arXiv 2107.07651.
"""

# Shapes: I images, X texts, B rows of a batch, n states of a tower, T text tokens, V image tokens, W tower width.

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unimo3.data.captioned import CaptionedImages
from unimo3.data.loader import ReaderArgs, planned_batches
from unimo3.data.order import full_batch_positions
from unimo3.distributed import World, all_gather_object, gather_rows
from unimo3.engine import Engine
from unimo3.training.evaluation import Guard, to_device
from unimo3.training.retrieval.shortlist import Embeddings

Text = tuple[np.ndarray, np.ndarray]
"""A text's ids and mask, [T] each."""


class StateBlock(NamedTuple):
    """States of consecutive images or texts on the host.

    Attributes:
        start: number of the first one: an image's among those of this rank, batch after batch; a text's among all.
        states: [rows, n, tokens, W].
    """

    start: int
    states: Tensor

    @property
    def end(self) -> int:
        """Number after the last one."""
        return self.start + len(self.states)


class Towers:
    """Runs the towers over a held-out set; every rank calls the same methods in the same order.

    Nothing a method yields or returns counts once the guard is cut.

    Args:
        engine: over a `RetrievalLoss`, in evaluation mode.
        batch: images or texts a batch.
        cache_bytes: host memory for states, half for images and half for texts.
    """

    def __init__(
        self,
        engine: Engine,
        samples: CaptionedImages,
        world: World,
        batch: int,
        reader: ReaderArgs,
        cache_bytes: float,
        guard: Guard,
    ):
        self._engine, self._samples, self._world, self._batch = engine, samples, world, batch
        self._reader, self._guard, self._half_bytes = reader, guard, cache_bytes / 2
        self.num_images = int(samples.units_per_shard.sum())
        self._plan = full_batch_positions(self.num_images, world.rank, world.size, batch)
        self._ids = self._mask = torch.empty(0)
        self._images: StateBlock | None = None
        self._texts: StateBlock | None = None

    @property
    def masks(self) -> Tensor:
        """[X, T], 1 where a text's token is real."""
        return self._mask

    def local_images(self) -> Tensor:
        """Numbers of the rank's images in the order of their states; -1 pads its last batches."""
        return torch.tensor(self._plan).flatten()

    def embed(self) -> Embeddings | None:
        """Run both towers once, and cache the states if there is room for all of them; None if the guard was cut."""
        local_texts: list[tuple[int, list[Text]]] = []
        images: list[Tensor] = []
        texts: list[Tensor] = []
        for block in self._image_blocks(images, local_texts):
            self._images = block if len(block.states) == len(self._plan) * self._batch else None
        if self._guard.is_stopped:
            return None
        of_image = dict(entry for part in all_gather_object(local_texts) for entry in part)
        captions = [(image, *text) for image in range(self.num_images) for text in of_image[image]]
        image_of = torch.tensor([image for image, _, _ in captions])
        self._ids = torch.from_numpy(np.stack([ids for _, ids, _ in captions]))
        self._mask = torch.from_numpy(np.stack([mask for _, _, mask in captions]))
        for block in self._text_blocks(texts):
            self._texts = block if len(block.states) >= len(captions) else None
        if self._guard.is_stopped:
            return None
        return Embeddings(torch.cat(images)[: self.num_images], torch.cat(texts)[: len(captions)], image_of)

    def image_blocks(self) -> Iterator[StateBlock]:
        """This rank's images, in the same number of blocks on every rank."""
        if self._images is not None:
            yield self._images
        else:
            yield from self._image_blocks([], [])

    def text_blocks(self) -> Iterator[StateBlock]:
        """All texts."""
        if self._texts is not None:
            yield self._texts
        else:
            yield from self._text_blocks([])

    def _image_blocks(self, embeds: list[Tensor], texts: list[tuple[int, list[Text]]]) -> Iterator[StateBlock]:
        """Encode this rank's images; `embeds` gets those of all ranks, `texts` the numbers and texts of this rank's."""
        batches = self._guard.batches(planned_batches(self._samples, self._plan, self._reader))
        store: Tensor | None = None
        start = num_filled = 0
        for step, (loaded, counts) in enumerate(batches):
            for position, captions, is_counted in zip(self._plan[step], loaded["texts"], counts.tolist(), strict=True):
                if is_counted:
                    texts.append((position, captions))
            out = self._engine({"pixel_values": to_device({"images": loaded["images"]}, self._device)["pixel_values"]})
            embeds.append(gather_rows(out["embeds"]).cpu())
            if store is None:
                store = self._room_for(out["states"], (len(self._plan) - step) * self._batch)
            store[num_filled : num_filled + self._batch] = out["states"]
            num_filled += self._batch
            if num_filled == len(store):
                yield StateBlock(start, store)
                start, num_filled, store = start + num_filled, 0, None

    def _text_blocks(self, embeds: list[Tensor]) -> Iterator[StateBlock]:
        """Encode all texts, each on one rank, for all; `embeds` gets theirs."""
        num_texts, size = len(self._ids), self._world.size
        num_batches = math.ceil(num_texts / self._batch)
        store: Tensor | None = None
        # Batches in blocks that are full, and in this one; a block ends at the same batch at any number of ranks.
        first = done = 0

        def steps() -> Iterator[int]:
            while first + done < num_batches:
                yield first + done

        for step in self._guard.batches(steps()):
            start = (step + self._world.rank) * self._batch
            rows = torch.arange(start, start + self._batch).clamp(max=num_texts - 1)
            out = self._engine(
                {"input_ids": self._ids[rows].to(self._device), "attention_mask": self._mask[rows].to(self._device)}
            )
            if store is None:
                store = self._room_for(out["states"], (num_batches - first) * self._batch)
            # What a rank computed beyond the block's end is of no use.
            taken = min(size, len(store) // self._batch - done)
            embeds.append(gather_rows(out["embeds"])[: taken * self._batch].cpu())
            store[done * self._batch :][: taken * self._batch] = gather_rows(out["states"])[: taken * self._batch]
            done += taken
            if done * self._batch == len(store):
                yield StateBlock(first * self._batch, store)
                first, done, store = first + done, 0, None

    def _room_for(self, states: Tensor, num_rows: int) -> Tensor:
        """Host memory for as many rows like these as there is room for, full batches, at most `num_rows`."""
        row_bytes = states[0].numel() * states.element_size()
        num_batches = max(1, min(num_rows // self._batch, int(self._half_bytes // (row_bytes * self._batch))))
        is_pinned = states.device.type == "cuda"
        return torch.empty(num_batches * self._batch, *states.shape[1:], dtype=states.dtype, pin_memory=is_pinned)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._engine.device
        return device
