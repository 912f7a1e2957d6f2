"""Files as they come: odd images, odd texts, damaged shards. Each is used rightly, replaced and named, or refused."""

import io
import json
import re
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from tests.data.conftest import convert, draw_jpeg, index_again, saved, write_tar
from unimo3.data.index import ShardIndex
from unimo3.data.loader import ReaderArgs, TrainingLoader, evaluation_batches
from unimo3.data.order import SampleOrder, Unit
from unimo3.data.samples import BadSampleError, PretrainSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.errors import DataError, UnreachableError
from unimo3.images import decode
from unimo3.training.evaluation import to_device


def gradient(width=60, height=40) -> Image.Image:
    """Red grows to the right, green downwards."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, np.full_like(across, 40)], axis=-1).astype(np.uint8))


def mean_difference(content: bytes, wanted: Image.Image) -> float:
    decoded = decode(content)
    assert (decoded.mode, decoded.size) == ("RGB", wanted.size)
    return float(np.abs(np.asarray(decoded, float) - np.asarray(wanted, float)).mean())


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    return saved(gradient().transpose(back), "JPEG", quality=95, exif=exif)


def grey16() -> bytes:
    return saved(Image.fromarray(np.asarray(gradient())[..., 0].astype(np.uint16) * 257), "PNG")


def grey() -> Image.Image:
    red = np.asarray(gradient())[..., 0]
    return Image.fromarray(np.stack([red] * 3, axis=-1))


ODD_IMAGES = {
    "CMYK": (lambda: saved(gradient().convert("CMYK"), "JPEG", quality=95), gradient, 6),
    "grey": (lambda: saved(gradient().getchannel("R"), "JPEG", quality=95), grey, 3),
    "16 bits a pixel": (grey16, grey, 1),
    "palette": (lambda: saved(gradient().quantize(256), "PNG"), gradient, 8),
    "palette with transparency": (lambda: saved(gradient().quantize(256), "PNG", transparency=0), gradient, 8),
    "alpha": (lambda: saved(gradient().convert("RGBA"), "PNG"), gradient, 0),
    "animated PNG": (
        lambda: saved(gradient(), "PNG", save_all=True, append_images=[Image.new("RGB", (60, 40))]),
        gradient,
        0,
    ),
    "animated WebP": (
        lambda: saved(gradient(), "WEBP", save_all=True, append_images=[Image.new("RGB", (60, 40))], quality=95),
        gradient,
        6,
    ),
    "turned by 180": (lambda: turned(3), gradient, 3),
    "turned to the left": (lambda: turned(6), gradient, 3),
    "turned to the right": (lambda: turned(8), gradient, 3),
}


@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_odd_images_are_seen_as_people_see_them(kind):
    content, wanted, tolerance = ODD_IMAGES[kind]
    assert mean_difference(content(), wanted()) <= tolerance


@pytest.fixture(scope="module")
def tokenizer(coco):
    return load_tokenizer(str(coco / "tokenizer"))


def samples_of(folder, tokenizer):
    return PretrainSamples(ShardIndex(folder), tokenizer, 16, ImageTransform(32), 0.15, 0)


def described(*captions, **others) -> bytes:
    return json.dumps({"image_id": 1, "captions": list(captions)} | others).encode()


def build(tmp_path, tokenizer, members):
    write_tar(tmp_path / "000000.tar", {"one": members})
    index_again(tmp_path)
    inputs = samples_of(tmp_path, tokenizer).build(Unit(0, 0, 0))
    return {**inputs, "images": inputs["images"]()}


BAD = {
    "truncated JPEG": ({"jpg": draw_jpeg(0)[:400], "json": described("a")}, "its image cannot be decoded"),
    "20000 x 20000 PNG": ({"png": None, "json": described("a")}, "its image cannot be decoded .*exceeds limit"),
    "no image at all": ({"jpg": b"<html>not found</html>", "json": described("a")}, "is no image of a known kind"),
    "an image of no bytes": ({"jpg": b"", "json": described("a")}, "its image cannot be decoded"),
    "no image member": ({"json": described("a")}, "has no image member"),
    "no text member": ({"jpg": draw_jpeg(0)}, "has no json member and no txt member"),
    "empty captions": ({"jpg": draw_jpeg(0), "json": described("", "  ")}, "has no caption"),
    "no captions": ({"jpg": draw_jpeg(0), "json": described()}, "has no caption"),
    "half a json": ({"jpg": draw_jpeg(0), "json": b'{"captions": ["a'}, "its json cannot be read"),
    "a json list": ({"jpg": draw_jpeg(0), "json": b"[1]"}, "its json is a list; an object is needed"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_samples_are_logged_with_the_reason(tmp_path, tokenizer, monkeypatch, what):
    members, expected = BAD[what]
    if members.get("png", b"") is None:
        members = members | {"png": saved(Image.new("1", (20000, 20000)), "PNG")}
        # A bomb is refused by its header alone.
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("its pixels were decoded"))
    with pytest.raises(BadSampleError, match=expected):
        build(tmp_path, tokenizer, members)


@pytest.mark.parametrize(
    "members",
    [
        {"json": described("", "a word " * 1500)},
        {"json": json.dumps({"caption": "of another maker"}).encode()},
        {"txt": "déjà vu".encode()},
        {"json": described(None, 7, "one text")},
    ],
    ids=["10 kB", "caption", "txt", "captions of other types"],
)
def test_texts_of_other_makers_and_of_any_length_are_read(tmp_path, tokenizer, members):
    inputs = build(tmp_path, tokenizer, members | {"jpg": draw_jpeg(0)})
    assert inputs["input_ids"].shape == (16,)
    assert inputs["attention_mask"].sum() >= 3


def test_a_truncated_tar_is_not_indexed_and_it_is_named(coco, tmp_path, capfd):
    shutil.copy(coco / "train" / "000001.tar", tmp_path / "cut.tar")
    content = (tmp_path / "cut.tar").read_bytes()
    for length in (len(content) // 2, 700):
        (tmp_path / "cut.tar").write_bytes(content[:length])
        assert convert("index", "--src", str(tmp_path)) == 78
        error = capfd.readouterr().err
        assert re.search(r"cut\.tar: is (cut off after \d samples|no readable tar .*); .*copy it again", error)
        assert [path.name for path in tmp_path.iterdir()] == ["cut.tar"]


def exchange(folder):
    """Give a shard another one's content, padded to its size."""
    first, second = folder / "000000.tar", folder / "000001.tar"
    size, content = first.stat().st_size, second.read_bytes()
    first.write_bytes((content + b"\0" * size)[:size])
    return r"000000\.tar: is not the tar that was indexed: 0000.* should begin at byte \d+, but (no|a) member"


def lose(folder):
    (folder / "000000.tar").unlink()
    return r"000000\.tar: cannot be read \(No such file or directory\); check the file and its file system"


def make_unreadable(folder):
    # For root a file without permissions is readable; a folder is not.
    (folder / "000000.tar").unlink()
    (folder / "000000.tar").mkdir()
    return r"000000\.tar: cannot be read \(Is a directory\)"


def give_no_answer(folder):
    (folder / "000000.tar").unlink()
    (folder / "000000.tar").symlink_to("/proc/self/mem")  # reading it ends with EIO
    return r"000000\.tar: cannot be read \(Input/output error\)"


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [exchange, lose, make_unreadable, give_no_answer])
def test_a_shard_that_goes_bad_under_a_run_ends_it_with_its_name(coco, tmp_path, tokenizer, damage, workers):
    folder = tmp_path / "train"
    shutil.copytree(coco / "train", folder)
    samples, reader = samples_of(folder, tokenizer), ReaderArgs(workers, 1)
    expected = damage(folder)
    order = SampleOrder(samples.units_per_shard, 0, 4)
    with pytest.raises(DataError, match=expected) as error:
        for _, _ in zip(range(8), TrainingLoader([samples], order, 4, 4, 0, 1, reader), strict=False):
            pass
    assert "Traceback" not in str(error.value)
    assert isinstance(error.value, UnreachableError) == (damage is give_no_answer)  # it may answer at the next start
    with pytest.raises(DataError, match=expected):
        list(evaluation_batches(samples, 0, 1, 4, reader))


def test_members_may_lie_in_any_order_in_folders_and_under_long_names(tmp_path, tokenizer):
    long = "x" * 180
    write_tar(
        tmp_path / "000000.tar",
        {
            f"a/{long}": {"json": described("one"), "jpg": draw_jpeg(1)},
            "b": {"jpg": draw_jpeg(2), "json": described("two")},
        },
    )
    index_again(tmp_path)
    index = ShardIndex(tmp_path)
    assert [index.key(0, sample) for sample in range(2)] == [f"a/{long}", "b"]
    assert index.read(0, 0) == {"jpg": draw_jpeg(1), "json": described("one")}
    assert samples_of(tmp_path, tokenizer).build(Unit(0, 0, 1))["images"]().shape == (32, 32, 3)


def test_folders_without_a_sample_are_refused(tmp_path, capfd):
    assert convert("index", "--src", str(tmp_path)) == 78
    assert "no .tar files there" in capfd.readouterr().err
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert convert("index", "--src", str(tmp_path)) == 78
    assert "its 1 tars contain no samples" in capfd.readouterr().err


def test_a_random_crop_has_the_requested_size_and_depends_on_the_sample(coco, tokenizer):
    content = saved(gradient(200, 100), "PNG")
    transform = ImageTransform(32, crop_scale=0.25)
    drawn = [transform(content, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    # A quarter of the area shows less of the gradient than all of it does.
    full = ImageTransform(32)(content, np.random.default_rng(0))

    def spread(pixels):
        return float(pixels[..., 0].max()) - float(pixels[..., 0].min())

    assert all(spread(crop) < 0.95 * spread(full) for crop in drawn)


def test_half_a_surrogate_pair_does_not_crash(tmp_path, tokenizer):
    inputs = build(tmp_path, tokenizer, {"json": b'{"captions": ["a dog \\ud83d"]}', "jpg": draw_jpeg(0)})
    assert inputs["attention_mask"].sum() >= 3


def test_a_json_of_endless_depth_is_a_bad_sample(tmp_path, tokenizer):
    with pytest.raises(BadSampleError, match="its json cannot be read"):
        build(tmp_path, tokenizer, {"json": b"[" * 100_000, "jpg": draw_jpeg(0)})


def batches_of(folder, tokenizer, number, order_shards=4):
    samples = samples_of(folder, tokenizer)
    order = SampleOrder(samples.units_per_shard, 0, order_shards)
    loader = TrainingLoader([samples], order, 4, 4, 0, 1, ReaderArgs(0, 1))
    return [micro_batches[0] for micro_batches, _ in zip(loader, range(number), strict=False)]


def test_a_bad_sample_alone_in_its_shard_is_replaced_from_the_next_one(tmp_path, tokenizer):
    good = {str(number): {"jpg": draw_jpeg(number), "json": described("a")} for number in range(7)}
    write_tar(tmp_path / "000000.tar", good)
    write_tar(tmp_path / "000001.tar", {"bad": {"jpg": b"", "json": described("a")}})
    index_again(tmp_path)
    batches = batches_of(tmp_path, tokenizer, 2)
    assert sum(batch["num_replaced"] for batch in batches) == 1
    assert Counter(key for batch in batches for key in batch["keys"]) == Counter(
        {"0": 2} | {str(n): 1 for n in range(1, 7)}
    )


def test_each_row_that_was_replaced_counts_once(tmp_path, tokenizer):
    samples = {f"{number:02d}": {"jpg": draw_jpeg(number), "json": described("a")} for number in range(16)}
    for number in range(3, 9):
        samples[f"{number:02d}"]["jpg"] = b"no image"
    write_tar(tmp_path / "000000.tar", samples)
    index_again(tmp_path)
    batches = batches_of(tmp_path, tokenizer, 4)
    assert sum(batch["num_replaced"] for batch in batches) == 6
    assert {key for batch in batches for key in batch["keys"]} == set(samples) - {f"{n:02d}" for n in range(3, 9)}


def test_a_sixteen_bit_image_is_rotated_by_its_exif_orientation():
    grey = Image.fromarray((np.arange(6, dtype=np.uint16) * 10_000).reshape(2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    grey.save(file, "PNG", exif=exif)
    upright = np.asarray(decode(file.getvalue()))[..., 0]
    assert upright.tolist() == [[117, 0], [156, 39], [195, 78]]


def test_a_batch_on_the_device_has_pixel_values_in_place_of_images():
    images = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    moved = to_device({"images": images, "keys": ["a", "b"]}, torch.device("cpu"))
    assert sorted(moved) == ["keys", "pixel_values"]
    assert moved["pixel_values"].shape == (2, 3, 4, 4)
    assert moved["pixel_values"].dtype == torch.float32
