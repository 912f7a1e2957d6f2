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
from unimo3.inference.search_index import SearchIndex, images_in, open_search_index, save


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
        {"embeds": "0" * 64},
        {"embeds": None},
        b"\xff\xfe\0",
        '{"kind": "\udcff"',
        torch.zeros(2, 4, dtype=torch.float16),
        torch.zeros(2),
        torch.zeros(()),
    ],
    ids=lambda change: str(change)[:20],
)
def test_a_changed_index_is_refused(tmp_path, weights, change):
    save(SearchIndex("texts", ["a", "b"], tmp_path, torch.zeros(2, 4)), weights, tmp_path / "index")
    assert open_search_index(tmp_path / "index", weights).names == ["a", "b"]
    path = tmp_path / "index" / "index.json"
    if isinstance(change, torch.Tensor):
        save_file({"embeds": change}, tmp_path / "index" / "embeds.safetensors")
    elif isinstance(change, str | bytes):
        path.write_bytes(change if isinstance(change, bytes) else change.encode("utf-8", "surrogateescape"))
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match="contains no complete index"):
        open_search_index(tmp_path / "index", weights)


def test_an_index_is_read_in_any_encoding_of_json_and_with_any_names(tmp_path, weights, monkeypatch):
    names = ["déjà 犬", "half \ud83d", "no \udce9 UTF-8", "two\r\nlines", "a"]
    save(SearchIndex("images", names, tmp_path, torch.ones(5, 4)), weights, tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    content = json.loads(path.read_text())
    monkeypatch.setenv("LC_ALL", "C")
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        written = json.dumps(content, ensure_ascii=False, indent=0).replace("\n", "\r\n")
        path.write_bytes(written.encode("utf-8", "replace").decode().encode(encoding))
        assert open_search_index(tmp_path / "index", weights).names == [
            name.encode("utf-8", "replace").decode() for name in names
        ]
    path.write_text(json.dumps(content))
    assert open_search_index(tmp_path / "index", weights).names == names


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.5])
def test_vectors_that_have_changed_are_refused(tmp_path, weights, number):
    save(SearchIndex("texts", ["a", "b"], tmp_path, torch.zeros(2, 4)), weights, tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    save_file({"embeds": torch.full((2, 4), number)}, tmp_path / "index" / "embeds.safetensors")
    with pytest.raises(ConfigError, match=r"contains no complete index \(ValueError: embeds.safetensors is damaged\)"):
        open_search_index(tmp_path / "index", weights)
    content = json.loads(path.read_text())
    del content["embeds"]  # as an earlier version wrote it
    path.write_text(json.dumps(content))
    if number == 0.5:
        assert open_search_index(tmp_path / "index", weights).names == ["a", "b"]
    else:
        with pytest.raises(ConfigError, match=r"embeds.safetensors is damaged"):
            open_search_index(tmp_path / "index", weights)
