"""Images with captions to choose from: their pairs, and samples that cannot be used."""

import json

import numpy as np
import pytest

from tests.data.conftest import draw_jpeg, index_again, write_tar
from unimo3.data.choices import ChoiceSamples, Pair, example_of
from unimo3.data.index import ShardIndex
from unimo3.data.loader import ReaderArgs, evaluation_batches
from unimo3.data.order import Unit
from unimo3.data.sample_texts import BadSampleError
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.errors import DataError


def content(*images, **changes):
    choices = [{"text": f"caption {number}", "image": image} for number, image in enumerate(images)]
    return {"identifier": "a", "category": "b", "choices": choices} | changes


def samples_of(folder, coco, contents):
    """Samples with two images each, of which the first is a plain one, too."""
    members = [
        (
            str(number),
            {name: draw_jpeg(10 * number + side) for name, side in (("jpg", 0), ("0.jpg", 0), ("1.jpg", 1))}
            | {"json": json.dumps(one).encode()},
        )
        for number, one in enumerate(contents)
    ]
    write_tar(folder / "0.tar", members)
    index_again(folder, split="test")
    return ChoiceSamples(ShardIndex(folder), load_tokenizer(str(coco / "tokenizer")), 12, ImageTransform(16), 0)


def test_units_are_all_images_of_a_sample_with_all_its_captions(coco, tmp_path):
    samples = samples_of(tmp_path, coco, [content(None, 0, None), content(0, 1)])
    assert samples.units_per_shard == [3 + 4]
    last = samples.build(Unit(0, 0, 6))
    assert last["pair"] == Pair(1, 1, 1)
    assert samples.key(Unit(0, 0, 6)) == "1#1-1"
    assert last["example"].images == (0, 1)
    expected = ImageTransform(16)(draw_jpeg(11), np.random.default_rng(0))
    assert np.array_equal(last["images"](), expected)
    pairs = [samples.build(Unit(0, 0, unit))["pair"] for unit in range(7)]
    assert len({*pairs}) == 7


BAD = {
    "no object": {"choices": ["a dog", "a cat"]},
    "no list": {"choices": 7},
    "no identifier": {"identifier": " "},
    "a caption that is no text": {"choices": [{"text": 1, "image": 0}, {"text": "a", "image": None}]},
    "a category that is no text": {"category": 7},
    "no image's caption": content(None, None),
    "two captions of one image": content(0, 0),
    "a third image": content(0, 1, 2),
    "the second image alone": content(1, None),
    "true for an image": content(True, None),
    "a text for an image": content("0", None),
    "one choice": content(0),
    "no choice": content(),
    "two images and three captions": content(0, 1, None),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_example_is_one_error_that_names_the_sample(name, coco, tmp_path):
    bad = content(0, None) | BAD[name]
    with pytest.raises(BadSampleError):
        example_of(bad)
    samples = samples_of(tmp_path, coco, [content(0, None), bad])
    with pytest.raises(DataError, match=r"0\.tar: sample 1#0-0 .*; held-out samples must all be scored"):
        list(evaluation_batches(samples, 0, 1, 4, ReaderArgs(0, 1)))


def test_a_category_may_be_missing():
    assert example_of({**content(0, None), "category": None}).category == ""
