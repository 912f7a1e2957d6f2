"""An index of a folder's images, to be searched by texts: their embeddings by the image tower, saved.

    INDEX/embeddings.safetensors    images [I, D], unit vectors, float32
    INDEX/index.json                names in the same order, what could not be read, which weights made it, the other
                                    file's sha256; written last

Source: the safetensors format; CLIP, arXiv 2103.00020, for search by cosine.
"""

# Shapes: I images, D width of the embeddings.

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unimo3.data.images import decode
from unimo3.data.members import sha256_of
from unimo3.data.samples import IMAGE_EXTENSIONS
from unimo3.errors import ConfigError, DataError
from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
from unimo3.model.processor import Unimo3Processor

log = logging.getLogger(__name__)

INDEX, EMBEDDINGS = "index.json", "embeddings.safetensors"
_AGAIN = "make the index again"


@dataclass(frozen=True)
class ImageIndex:
    """Images in the towers' common space.

    Attributes:
        names: of the files, below the folder that was indexed.
        embeds: [I, D], unit vectors.
        unreadable: names of files that could not be decoded.
        weights: fingerprint of the contrastive head they were made with.
    """

    names: list[str]
    embeds: Tensor
    unreadable: list[str]
    weights: str

    def save(self, folder: Path) -> None:
        """Write the two files, each by rename."""
        folder.mkdir(parents=True, exist_ok=True)
        staging = folder / f"{EMBEDDINGS}.tmp"
        save_file({"images": self.embeds.contiguous()}, staging)
        digest = sha256_of(staging)
        staging.replace(folder / EMBEDDINGS)
        content = {"names": self.names, "unreadable": self.unreadable, "weights": self.weights, "sha256": digest}
        staging = folder / f"{INDEX}.tmp"
        staging.write_text(json.dumps(content, indent=1) + "\n")
        staging.replace(folder / INDEX)

    @classmethod
    def load(cls, folder: Path) -> "ImageIndex":
        """Read what `save` wrote.

        Raises:
            DataError: a file is missing, damaged, or not of the other one.
        """
        try:
            content = json.loads((folder / INDEX).read_text())
            names, unreadable, weights, digest = (
                content[name] for name in ("names", "unreadable", "weights", "sha256")
            )  # fmt: skip
            if sha256_of(folder / EMBEDDINGS) != digest:
                raise DataError(f"{folder / EMBEDDINGS}: is not the file that {INDEX} was written with; {_AGAIN}")
            embeds = load_file(folder / EMBEDDINGS)["images"]
        except OSError as error:
            raise DataError(f"{error.filename or folder}: cannot be read ({error.strerror}); {_AGAIN}") from error
        except (json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(f"{folder}: holds no index of images that can be read ({error!r}); {_AGAIN}") from error
        return cls(names, embeds, unreadable, weights)


@torch.no_grad()
def index_images(
    model: Unimo3ForImageAndTextRetrieval, processor: Unimo3Processor, folder: Path, batch: int = 32
) -> ImageIndex:
    """Embed the images of a folder and of the folders in it, in the order of their names.

    Args:
        batch: images encoded at a time.

    Raises:
        DataError: there is no such folder, or no image in it that can be decoded.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name one that holds images")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
    names: list[str] = []
    unreadable: list[str] = []
    embeds: list[Tensor] = []
    model.eval()
    for start in range(0, len(files), batch):
        images: list[Image.Image] = []
        for file in files[start : start + batch]:
            name = file.relative_to(folder).as_posix()
            try:
                images.append(decode(file.read_bytes()))
                names.append(name)
            except MemoryError:
                raise  # the machine's fault, not the image's
            except Exception as error:  # decoders meet damage with errors of any kind
                log.warning("%s cannot be decoded (%s) and is left out", file, error)
                unreadable.append(name)
        if images:
            pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(model.device)
            embeds.append(model.itc_head.embed_image(model.unimo3.encode_image(pixels)).cpu())
    if not embeds:
        raise DataError(
            f"{folder}: holds no image that can be decoded ({', '.join(IMAGE_EXTENSIONS)}; {len(unreadable)} cannot); "
            "name another folder"
        )
    return ImageIndex(names, torch.cat(embeds), unreadable, _fingerprint(model))


@torch.no_grad()
def search_images(
    index: ImageIndex, model: Unimo3ForImageAndTextRetrieval, processor: Unimo3Processor, text: str, num: int
) -> list[tuple[str, float]]:
    """The `num` images (or all there are) most alike to a text: names and cosines, the best first.

    Of equal ones the first name goes first.

    Raises:
        ConfigError: the index was made with other weights.
    """
    if index.weights != _fingerprint(model):
        raise ConfigError("index: was made with other weights than search it; make it again with these")
    model.eval()
    inputs = processor(text=[text], return_tensors="pt").to(model.device)
    states = model.unimo3.encode_text(inputs["input_ids"], inputs["attention_mask"])
    cosines = index.embeds @ model.itc_head.embed_text(states)[0].cpu()
    values, places = cosines.sort(descending=True, stable=True)
    return [(index.names[place], value) for place, value in zip(places[:num].tolist(), values.tolist(), strict=False)]


def _fingerprint(model: Unimo3ForImageAndTextRetrieval) -> str:
    """Of the contrastive head, which every step of training changes."""
    digest = hashlib.sha256()
    for _, value in sorted(model.itc_head.state_dict().items()):
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
