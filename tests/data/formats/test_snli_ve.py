"""SNLI-VE: one sample a photo and split, with the hypotheses that the annotators agreed on."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.data.formats.conftest import convert, error_of, lose, set_at, write_lines


def record(photo: str, hypothesis: str, label: str) -> dict:
    return {
        "Flickr30K_ID": photo,
        "sentence1": "A premise.",
        "sentence2": hypothesis,
        "gold_label": label,
        "pairID": f"{photo}.jpg#2r1n",
        "annotator_labels": [label],
    }


TRAIN = [
    record("3416050480", "They sleep. ", "contradiction"),
    record("36979", "Ein Fluß.", "entailment"),
    record("3416050480", "They talk.", "neutral"),
    record("3416050480", "They talk.", "entailment"),
    record("36979", "Nobody knows.", "-"),
    record("65567", "Nobody knows.", "-"),
]
DEV = [record("65567", "A dog.", "neutral")]
TEST = [record("77", "A cat.", "entailment")]


def write_source(root: Path, end: str = "\n", bom: bool = False) -> Path:
    for name, records in (("train", TRAIN), ("dev", DEV), ("test", TEST)):
        write_lines(root / f"snli_ve_{name}.jsonl", records, end, bom)
    return root


def content_of(photo: str, text: str, label: str) -> dict:
    return {"text": text, "label": label, "pair_id": f"{photo}.jpg#2r1n"}


@pytest.mark.parametrize(("end", "bom"), [("\n", False), ("\r\n", True)], ids=["release", "windows"])
def test_hypotheses_are_gathered_by_photo(tmp_path, end, bom):
    read = convert("snli_ve", write_source(tmp_path, end, bom))
    assert [(split, sample.key, sample.content) for split, sample in read.samples] == [
        (
            "train",
            "003416050480",
            {
                "image_id": 3416050480,
                "hypotheses": [
                    content_of("3416050480", "They sleep.", "contradiction"),
                    content_of("3416050480", "They talk.", "neutral"),
                    content_of("3416050480", "They talk.", "entailment"),
                ],
            },
        ),
        ("train", "000000036979", {"image_id": 36979, "hypotheses": [content_of("36979", "Ein Fluß.", "entailment")]}),
        ("val", "000000065567", {"image_id": 65567, "hypotheses": [content_of("65567", "A dog.", "neutral")]}),
        ("test", "000000000077", {"image_id": 77, "hypotheses": [content_of("77", "A cat.", "entailment")]}),
    ]


def test_hypotheses_without_agreement_are_counted(tmp_path):
    assert convert("snli_ve", write_source(tmp_path)).omitted == {"no gold label": 2}


@pytest.mark.parametrize("folder", ["flickr30k-images", "."])
def test_photos_lie_in_their_folder_or_in_the_images_folder(tmp_path, folder):
    images = tmp_path / "images"
    (images / folder).mkdir(parents=True)
    read = convert("snli_ve", write_source(tmp_path), images)
    names = ("3416050480.jpg", "36979.jpg", "65567.jpg", "77.jpg")
    assert [sample.images for _, sample in read.samples] == [(images / folder / name,) for name in names]


LABELS = "one of entailment, neutral, contradiction, - expected"
ERRORS = [
    (lose(1, "Flickr30K_ID"), ": line 2: field 'Flickr30K_ID' is missing; str expected"),
    (set_at(1, "Flickr30K_ID", value=36979), ": line 2: field 'Flickr30K_ID' is 36979; str expected"),
    (set_at(1, "Flickr30K_ID", value="vg_1"), ": line 2: field 'Flickr30K_ID' is 'vg_1'; a photo's number of at most"),
    (lose(2, "gold_label"), ": line 3: field 'gold_label' is missing; str expected"),
    (set_at(2, "gold_label", value="maybe"), f": line 3: field 'gold_label' is 'maybe'; {LABELS}"),
    (set_at(2, "gold_label", value=""), f": line 3: field 'gold_label' is ''; {LABELS}"),
    (lose(0, "sentence2"), ": line 1: field 'sentence2' is missing; str expected"),
    (lose(0, "pairID"), ": line 1: field 'pairID' is missing; str expected"),
    (set_at(4, "sentence2", value="\t"), ": line 5: field 'sentence2' is empty; remove the record or give it a text"),
]


@pytest.mark.parametrize(("change", "expected"), ERRORS, ids=[expected for _, expected in ERRORS])
def test_a_bad_field_is_named(tmp_path, change, expected):
    path = write_lines(write_source(tmp_path) / "snli_ve_train.jsonl", change(TRAIN))
    assert re.match(re.escape(f"{path}{expected}"), error_of("snli_ve", tmp_path))


@pytest.mark.parametrize("name", ["train", "dev", "test"])
def test_a_missing_file_is_named(tmp_path, name):
    path = write_source(tmp_path) / f"snli_ve_{name}.jsonl"
    path.unlink()
    assert error_of("snli_ve", tmp_path).startswith(f"{path}: cannot be read")


def test_all_that_the_toy_writes_is_read(drawn):
    read = convert("snli_ve", drawn / "snli_ve", drawn / "flickr30k")
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        lines = (drawn / "snli_ve" / f"snli_ve_{name}.jsonl").read_text().splitlines()
        wanted = [json.loads(line) for line in lines]
        assert wanted
        assert [
            (str(sample.content["image_id"]), hypothesis["text"], hypothesis["label"])
            for sample in read.split(split)
            for hypothesis in sample.content["hypotheses"]
        ] == [(line["Flickr30K_ID"], line["sentence2"], line["gold_label"]) for line in wanted]
        for sample in read.split(split):
            (file,) = sample.images
            assert Image.open(file).size == (32, 32)
