"""A saved index: images of a folder, or texts, in the towers' common space.

    INDEX/embeds.safetensors    ``embeds`` [N, itc_size] float32, unit vectors
    INDEX/index.json            what they are of, their names in that order, the SHA-256 of the weights' files and of
                                embeds.safetensors

Source: ALBEF, arXiv 2107.07651, section 4, for search by the towers.
"""

# Shapes: N images or texts, B of a batch, D width of the embeddings.

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unimo3.checkpoint.manifest import sha256_of
from unimo3.errors import ConfigError, DataError
from unimo3.images import FORMATS, is_image
from unimo3.inference.exported_model import Loaded
from unimo3.inference.inputs import read_pixels, tokens
from unimo3.inference.prefetch import one_ahead
from unimo3.model.pretrained.fill import weight_files
from unimo3.objectives.retrieval import RetrievalLoss
from unimo3.versions import check_version

# A file of such a name has to be an image; any other is one if it begins as one.
IMAGE_ENDINGS = (
    ".apng",
    ".avif",
    ".bmp",
    ".gif",
    ".heic",
    ".heif",
    ".jfif",
    ".jp2",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
Kind = Literal["images", "texts"]
_EMBEDS = "embeds.safetensors"
_VERSION = 1


class SearchIndex(NamedTuple):
    """What is searched.

    Attributes:
        names: of images their paths, under `root`; of texts the texts.
        root: folder of the images; unused for texts.
        embeds: [N, D] on the CPU.
    """

    kind: Kind
    names: list[str]
    root: Path
    embeds: Tensor

    def path(self, number: int) -> Path:
        """File of an image."""
        return self.root / self.names[number]


def images_in(folder: Path) -> tuple[list[str], list[str]]:
    """Paths of all image files below a folder, relative to it, in order, and of the files that are none.

    Links to folders are not followed; they are among the second.

    Raises:
        ConfigError: there is no image, or a folder cannot be listed.
    """
    if not folder.is_dir():
        raise ConfigError(f"--images {folder}: no such folder; name a folder of images")
    images: list[Path] = []
    others: list[Path] = []
    for root, folders, files in os.walk(folder, onerror=_raise_unlisted):
        others += [path for name in folders if (path := Path(root, name)).is_symlink()]
        for path in (Path(root, name) for name in files):
            # A pipe or a device would be waited for; a link to nothing is reported when it is read.
            is_readable = path.is_file() or not path.exists()
            is_named = path.suffix.lower() in IMAGE_ENDINGS
            (images if is_readable and (is_named or is_image(path)) else others).append(path)
    if not images:
        raise ConfigError(
            f"--images {folder}: has no image among its {len(others)} files ({', '.join(FORMATS)} are read); name "
            "another folder"
        )
    relative, skipped = (sorted(str(path.relative_to(folder)) for path in paths) for paths in (images, others))
    return relative, skipped


@torch.inference_mode()
def embed_images(
    loaded: Loaded, root: Path, names: Sequence[str], batch: int, done: Callable[[int], Any] = lambda count: None
) -> tuple[SearchIndex, list[str]]:
    """Run the image tower over files.

    Args:
        batch: images at a time.
        done: called with each batch's number of files.

    Returns:
        The index of those that could be decoded, and why each other could not.
    """
    task = RetrievalLoss(loaded.model, seed=0)
    can_be_decoded: list[bool] = []
    errors: list[str] = []
    embeds: list[Tensor] = []
    parts = ([root / name for name in names[start : start + batch]] for start in range(0, len(names), batch))
    for read in one_ahead(partial(_read, loaded), parts):
        images = [image for image in read if isinstance(image, Tensor)]
        errors += [str(image) for image in read if isinstance(image, DataError)]
        can_be_decoded += [isinstance(image, Tensor) for image in read]
        if images:
            embeds.append(task({"pixel_values": torch.stack(images).to(loaded.device)})["embeds"].cpu())
        done(len(read))
    decoded = [name for name, is_decoded in zip(names, can_be_decoded, strict=True) if is_decoded]
    if not decoded:
        raise DataError(f"{root}: none of {len(names)} files could be decoded; the first: {errors[0]}")
    return SearchIndex("images", decoded, root, torch.cat(embeds)), errors


@torch.inference_mode()
def embed_texts(
    loaded: Loaded, texts: Sequence[str], batch: int, done: Callable[[int], Any] = lambda count: None
) -> SearchIndex:
    """Run the text tower; see `embed_images`."""
    task = RetrievalLoss(loaded.model, seed=0)
    embeds = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        embeds.append(task(tokens(loaded, part))["embeds"].cpu())
        done(len(part))
    return SearchIndex("texts", list(texts), Path(), torch.cat(embeds))


def save(index: SearchIndex, weights: Path, out: Path) -> None:
    """Write an index's folder; it appears complete, by a rename.

    Args:
        weights: folder of the weights that made it.
        out: must not exist.
    """
    staging = out.with_name(f"{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        save_file({"embeds": index.embeds}, staging / _EMBEDS)
        described = {
            "version": _VERSION,
            "kind": index.kind,
            "root": str(index.root.resolve()),
            "weights": digest_of(weights),
            "embeds": sha256_of(staging / _EMBEDS),
            "names": index.names,
        }
        (staging / "index.json").write_text(json.dumps(described, indent=0) + "\n")
        staging.rename(out)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror}); check space and permissions") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def open_search_index(folder: Path, weights: Path) -> SearchIndex:
    """Read what `save` wrote.

    Raises:
        ConfigError: it is no index, of another version, or was made by other weights.
    """
    again = "remove it and make it again with python -m finetune.predict index"
    if not folder.is_dir():
        raise ConfigError(f"--index {folder}: no such folder; make one with python -m finetune.predict index")
    try:
        described = json.loads((folder / "index.json").read_bytes())
        check_version(f"--index {folder}/index.json", described, (_VERSION,), again)
        kind, root, names = described["kind"], Path(described["root"]), described["names"]
        embeds = load_file(folder / _EMBEDS)["embeds"]
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if kind not in ("images", "texts") or not names or not is_list:
            raise ValueError("its kind or its names are not those of an index")
        if embeds.dtype != torch.float32 or embeds.ndim != 2 or embeds.shape[0] != len(names):
            raise ValueError(f"{embeds.dtype} {list(embeds.shape)} are embedded, {len(names)} {kind} named")
        # An index of an earlier version has no digest.
        if described.get("embeds", digest := sha256_of(folder / _EMBEDS)) != digest or not embeds.isfinite().all():
            raise ValueError(f"{_EMBEDS} is damaged")
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError, SafetensorError) as error:
        raise ConfigError(
            f"--index {folder}: contains no complete index ({type(error).__name__}: {error}); {again}"
        ) from error
    if described.get("weights") != digest_of(weights):
        raise ConfigError(f"--index {folder}: was made by other weights than --weights {weights}; {again}")
    return SearchIndex(kind, names, root, embeds)


def digest_of(weights: Path) -> str:
    """SHA-256 of a folder's weights and configuration."""
    digest = hashlib.sha256()
    for path in [*weight_files(weights), weights / "config.json"]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _raise_unlisted(error: OSError) -> None:
    raise ConfigError(f"--images: {error.filename}: cannot be listed ({error.strerror}); check its permissions")


def _read(loaded: Loaded, paths: Sequence[Path]) -> list[Tensor | DataError]:
    """Each file's pixels, or its error."""
    results: list[Tensor | DataError] = []
    for path in paths:
        try:
            results.append(read_pixels(loaded, path))
        except DataError as error:
            results.append(error)
    return results
