"""A small source in COCO's and VQAv2's files, and the shards made of it."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain import prepare_shards
from unimo3.data.index_writer import table_of, write_index


def saved(image: Image.Image, kind: str, **options) -> bytes:
    """The content of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def draw_jpeg(number: int, width: int = 40, height: int = 30) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels), "JPEG")


def write_source(root: Path, num_images: int = 23) -> Path:
    """Images in train2014/ and val2014/, dataset_coco.json with all four splits, VQAv2's four files."""
    images, questions, notes = [], {"train2014": [], "val2014": []}, {"train2014": [], "val2014": []}
    for number in range(num_images):
        split = ("train", "train", "train", "restval", "val", "test")[number % 6]
        year = "train2014" if split == "train" else "val2014"
        name = f"COCO_{year}_{number + 1:012d}.jpg"
        (root / year).mkdir(parents=True, exist_ok=True)
        (root / year / name).write_bytes(draw_jpeg(number))
        captions = [f"picture number {number} seen from point {index}" for index in range(5)] + ["a picture"] * 2
        images.append(
            {
                "filepath": year,
                "filename": name,
                "split": split,
                "cocoid": number + 1,
                "imgid": number,
                "sentences": [{"raw": caption, "tokens": caption.split()} for caption in captions],
            }
        )
        for index in range(1 + number % 3):
            identity = (number + 1) * 100 + index
            answer = "yes" if (number + index) % 2 else "a dog"
            questions[year].append(
                {"image_id": number + 1, "question_id": identity, "question": f"is {index} in picture {number}?"}
            )
            notes[year].append(
                {
                    "question_id": identity,
                    "image_id": number + 1,
                    "question_type": "is",
                    "answer_type": "yes/no" if answer == "yes" else "other",
                    "multiple_choice_answer": answer,
                    "answers": [{"answer": answer, "answer_id": i + 1} for i in range(9)]
                    + [{"answer": "no", "answer_id": 10}],
                }
            )
    (root / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    for year in questions:
        (root / f"v2_OpenEnded_mscoco_{year}_questions.json").write_text(json.dumps({"questions": questions[year]}))
        (root / f"v2_mscoco_{year}_annotations.json").write_text(json.dumps({"annotations": notes[year]}))
    return root


def convert(*arguments: str) -> int:
    """Run prepare_shards in this process; return its exit status."""
    with pytest.raises(SystemExit) as end:
        prepare_shards.main(list(arguments))
    return int(end.value.code or 0)


def write_tar(path: Path, samples: dict[str, dict[str, bytes]] | list[tuple[str, dict[str, bytes]]]) -> Path:
    """Samples' members by key and extension; in a list, keys may repeat."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items() if isinstance(samples, dict) else samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def index_again(folder: Path, dataset: str = "coco", split: str = "train") -> None:
    """Index a folder's tars as they are now."""
    write_index(folder, dataset, split, [table_of(path) for path in sorted(folder.glob("*.tar"))])


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def coco(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "coco"
    assert (
        convert("coco", "--src", str(source), "--out", str(out), "--shard-size", "4", "--tokenizer-vocab", "300") == 0
    )
    return out


@pytest.fixture(scope="session")
def vqav2(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "vqav2"
    arguments = ("--src", str(source), "--out", str(out), "--shard-size", "4", "--min-answer-count", "3")
    assert convert("vqav2", *arguments) == 0
    return out
