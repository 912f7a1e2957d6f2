"""Samples -> WebDataset shards with their index, whole or not at all.

Source: webdataset's TarWriter; members carry fixed owner, mode and time, so equal input gives equal bytes.
"""

import io
import json
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import webdataset
from PIL import Image

from unimo3.data.convert import Sample
from unimo3.data.index import build_index
from unimo3.errors import DataError


def read_image(path: Path) -> bytes:
    """A file's bytes, after decoding it once.

    Raises:
        DataError: it is missing or no image that can be decoded.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); --images must name the images' folder") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.open(io.BytesIO(content)).load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: is no image that can be decoded ({error}); download it again") from error
    return content


class ShardWriter:
    """Writes one split's shards into a folder that the caller renames when all is done.

    Args:
        folder: new, for ``000000.tar`` and so on.
        samples_per_shard: samples of every shard but the last.
    """

    def __init__(self, folder: Path, samples_per_shard: int):
        self.folder = folder
        self.num_samples = 0
        self._samples_per_shard = samples_per_shard
        self._keys: set[str] = set()
        self._tar: webdataset.TarWriter | None = None
        folder.mkdir(parents=True)

    def write(self, sample: Sample) -> None:
        """Append a sample.

        Raises:
            DataError: its key has been written before, or its image is missing or cannot be decoded.
        """
        if sample.key in self._keys:
            raise DataError(
                f"{sample.image}: image id {sample.content['image_id']} stands in the source twice; remove one record"
            )
        self._keys.add(sample.key)
        image = read_image(sample.image)
        if self.num_samples % self._samples_per_shard == 0:
            self.close()
            path = self.folder / f"{self.num_samples // self._samples_per_shard:06d}.tar"
            self._tar = webdataset.TarWriter(str(path), user="unimo3", group="unimo3", mtime=0.0, encoder=False)
        assert self._tar is not None
        content = json.dumps(sample.content, ensure_ascii=False, sort_keys=True).encode()
        extension = {".jpeg": "jpg"}.get(sample.image.suffix.lower(), sample.image.suffix.lower().lstrip("."))
        self._tar.write({"__key__": sample.key, extension: image, "json": content})
        self.num_samples += 1

    def finish(self, dataset: str, split: str) -> None:
        """Write the index of the closed shards."""
        build_index(self.folder, dataset, split)

    def close(self) -> None:
        """Close the last shard."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None


def write_splits(
    dataset: str, samples: Iterable[tuple[str, Sample]], folder: Path, samples_per_shard: int
) -> dict[str, int]:
    """Write every split that `samples` holds to ``folder/SPLIT``; return samples per split."""
    writers: dict[str, ShardWriter] = {}
    try:
        for split, sample in samples:
            if split not in writers:
                writers[split] = ShardWriter(folder / split, samples_per_shard)
            writers[split].write(sample)
    finally:
        for writer in writers.values():
            writer.close()
    if not writers:
        raise DataError(f"{dataset}: the source holds no samples")
    for split, writer in writers.items():
        writer.finish(dataset, split)
    return {split: writer.num_samples for split, writer in writers.items()}


def clear(folder: Path) -> None:
    """Remove a folder of shards, its index first, so that a kill half way leaves nothing that passes for whole."""
    for index in folder.rglob("index.json"):
        index.unlink()
    shutil.rmtree(folder)
