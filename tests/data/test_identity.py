"""Which samples are of one image: by image_id, else by where they are stored."""

import json

import pytest

from tests.data.conftest import convert, draw_jpeg, index_again, write_tar
from unimo3.data.captioned import CaptionedImages
from unimo3.data.index import ShardIndex
from unimo3.data.loader import ReaderArgs, evaluation_batches
from unimo3.data.order import Unit
from unimo3.data.samples import BadSampleError, PretrainSamples, identity_of
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(coco):
    return load_tokenizer(str(coco / "tokenizer"))


def described(number, content):
    return {"jpg": draw_jpeg(number), "json": content if isinstance(content, bytes) else json.dumps(content).encode()}


def identities(folder, tokenizer, source=0):
    samples = PretrainSamples(ShardIndex(folder), tokenizer, 16, ImageTransform(16), 0.15, 0)
    units = [(shard, unit) for shard, size in enumerate(samples.units_per_shard) for unit in range(size)]
    return [int(samples.build(Unit(0, *unit, source))["image_id"]) for unit in units]


def identities_of(folder, tokenizer, *image_ids):
    """Of samples of one tar with these values of image_id."""
    contents = [{"caption": "a", "image_id": image_id} for image_id in image_ids]
    write_tar(folder / "0.tar", [(str(number), described(number, content)) for number, content in enumerate(contents)])
    index_again(folder)
    return identities(folder, tokenizer)


def test_equal_keys_in_other_tars_and_sources_are_other_images(tmp_path, tokenizer):
    for number in range(8):
        write_tar(tmp_path / f"{number}.tar", [("sample", {"jpg": draw_jpeg(number), "txt": b"a"})])
    index_again(tmp_path)
    first, second = identities(tmp_path, tokenizer), identities(tmp_path, tokenizer, source=1)
    assert len(set(first + second)) == 16


def test_equal_keys_in_one_tar_are_other_images_and_reported(tmp_path, tokenizer, capfd):
    one, two = ({"jpg": draw_jpeg(number), "json": b'{"caption": "a"}'} for number in range(2))
    write_tar(tmp_path / "0.tar", [("a", one), ("a", two), ("b", one), ("a", one)])
    write_tar(tmp_path / "1.tar", [("a", one), ("c", one)])
    assert convert("index", "--src", str(tmp_path)) == 0
    assert "0.tar: 2 samples have the key of an earlier sample, such as 'a'" in (output := capfd.readouterr().out)
    assert "1.tar" not in output
    assert len(set(identities(tmp_path, tokenizer))) == 6
    samples = PretrainSamples(ShardIndex(tmp_path), tokenizer, 16, ImageTransform(16), 0.15, 0)
    (batch, _), *_ = evaluation_batches(samples, 0, 1, 6, ReaderArgs(0, 1))
    assert batch["samples"] == [
        *((str(tmp_path), "0.tar", number, key) for number, key in enumerate("aaba")),
        *((str(tmp_path), "1.tar", number, key) for number, key in enumerate("ac")),
    ]


@pytest.mark.parametrize(
    "image_ids", [(7, 7), (0, 0), (7, "7"), (7, 7.0), ("a", " a\n"), (2**70, str(2**70)), ("\ud83d", "\ud83d")]
)
def test_equal_image_ids_are_one_image(tmp_path, tokenizer, image_ids):
    one, two, other = identities_of(tmp_path, tokenizer, *image_ids, 8)
    assert one == two != other


@pytest.mark.parametrize("image_id", [None, "", " ", float("nan")])
def test_without_an_image_id_each_sample_is_an_image(tmp_path, tokenizer, image_id):
    assert len(set(identities_of(tmp_path, tokenizer, image_id, image_id, "0 0 0"))) == 3


@pytest.mark.parametrize("image_id", [[1], {"id": 1}, True])
def test_an_image_id_of_another_type_is_a_bad_sample(tmp_path, tokenizer, image_id):
    with pytest.raises(BadSampleError, match=r"its image_id is a (list|dict|bool); a number or a text is needed"):
        identities_of(tmp_path, tokenizer, image_id)


def captioned(folder, tokenizer):
    return CaptionedImages(ShardIndex(folder), tokenizer, 16, ImageTransform(16))


def test_an_evaluated_image_has_the_captions_of_all_its_samples(tmp_path, tokenizer):
    def sample(number, image_id, *captions):
        return str(number), described(number, {"image_id": image_id, "captions": captions})

    write_tar(tmp_path / "0.tar", [sample(0, 5, "a"), sample(1, 6, "b"), sample(2, 5, "c", "d")])
    write_tar(tmp_path / "1.tar", [sample(3, "6", "e"), ("4", {"jpg": draw_jpeg(4), "txt": b"f"})])
    index_again(tmp_path)
    samples = captioned(tmp_path, tokenizer)
    assert samples.units_per_shard.tolist() == [2, 1]
    units = [Unit(0, 0, 0), Unit(0, 0, 1), Unit(0, 1, 0)]
    assert [samples.key(unit) for unit in units] == ["0", "1", "4"]
    texts = [[tokenizer.decode(ids, True).strip() for ids, _ in samples.build(unit)["texts"]] for unit in units]
    assert texts == [["a", "c", "d"], ["b", "e"], ["f"]]
    expected = ImageTransform(16)(draw_jpeg(1), None)
    assert (samples.build(units[1])["images"]() == expected).all()


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"image_id": 5, "captions": [" "]}, "sample 0 has the image_id of sample 1 of 0.tar, which has no caption"),
        (b'{"image_id": 5', "sample 1 its json cannot be read"),
        ({"image_id": [5], "caption": "a"}, "sample 1 its image_id is a list"),
    ],
)
def test_a_bad_sample_of_an_evaluated_image_is_an_error(tmp_path, tokenizer, second, expected):
    first = described(0, {"image_id": 5, "caption": "a"})
    write_tar(tmp_path / "0.tar", [("0", first), ("1", described(1, second))])
    index_again(tmp_path)
    with pytest.raises(DataError, match=expected):
        list(evaluation_batches(captioned(tmp_path, tokenizer), 0, 1, 4, ReaderArgs(0, 1)))


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN", "null", '""'])
def test_an_image_id_that_is_no_number_is_none(value):
    content = json.loads(f'{{"image_id": {value}}}')
    assert identity_of(content, 0, 1) != identity_of(content, 0, 2)
