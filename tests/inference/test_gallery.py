"""Which files of a folder are images, and indexes that cannot be used."""

import io
import json
import os

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.data.conftest import draw_jpeg
from unimo3.errors import ConfigError
from unimo3.inference.gallery import Gallery, images_in, open_gallery, save


def drawn(kind: str) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(draw_jpeg(0))).save(file, kind)
    return file.getvalue()


def test_files_are_images_by_their_content_and_the_others_are_named(tmp_path):
    images = {
        "a.jpg": "JPEG",
        "b.jfif": "JPEG",
        "c.jpe": "JPEG",
        "d.heic": "JPEG",
        "e.jp2": "JPEG2000",
        "f.apng": "PNG",
        "g": "PNG",
        "sub/h.txt": "WEBP",
        "sub/i.JPG": "JPEG",
        "j.png.part": "GIF",
    }
    (tmp_path / "sub" / "below.jpg").mkdir(parents=True)
    for name, kind in images.items():
        (tmp_path / name).write_bytes(drawn(kind))
    # Of such a name a file has to be an image: its decoding reports that it is none.
    for name in ("k.jpg", "l.HEIC"):
        (tmp_path / name).write_bytes(b"<html>not found</html>")
    (tmp_path / "m.jpg").symlink_to(tmp_path / "gone")
    for name in ("notes.txt", ".DS_Store", "sub/empty"):
        (tmp_path / name).write_bytes(b"" if name.endswith("empty") else b"no image")
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    os.mkfifo(tmp_path / "pipe.jpg")
    names, skipped = images_in(tmp_path)
    assert names == sorted([*images, "k.jpg", "l.HEIC", "m.jpg"])
    assert skipped == sorted(["notes.txt", ".DS_Store", "sub/empty", "linked", "pipe.jpg"])


def test_a_folder_without_an_image_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ConfigError, match="has no image among its 1 files"):
        images_in(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        images_in(tmp_path / "gone")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "change",
    [
        "[]",
        "{",
        "[" * 100_000,
        {"names": [1, 2]},
        {"names": ["a"]},
        {"names": "ab"},
        {"names": {"a": 1, "b": 2}},
        {"names": []},
        {"kind": "sounds"},
        {"root": 5},
        {"root": None},
        torch.zeros(2, 4, dtype=torch.float16),
        torch.zeros(2),
        torch.zeros(()),
    ],
    ids=lambda change: str(change)[:20],
)
def test_a_changed_index_is_refused(tmp_path, weights, change):
    save(Gallery("texts", ["a", "b"], tmp_path, torch.zeros(2, 4)), weights, tmp_path / "index")
    assert open_gallery(tmp_path / "index", weights).names == ["a", "b"]
    path = tmp_path / "index" / "index.json"
    if isinstance(change, torch.Tensor):
        save_file({"embeds": change}, tmp_path / "index" / "embeds.safetensors")
    elif isinstance(change, str):
        path.write_text(change)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match="contains no complete index"):
        open_gallery(tmp_path / "index", weights)
