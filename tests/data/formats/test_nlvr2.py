"""NLVR2: two images a statement, in the folders of the release."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.data.conftest import convert as prepare_shards
from tests.data.conftest import draw_jpeg
from tests.data.formats.conftest import convert, error_of, lose, set_at, write_lines
from unimo3.data.index import ShardIndex

TRAIN = [
    {"identifier": "train-10171-0-0", "sentence": "One case. ", "label": "True", "directory": 55, "writer": 138},
    {"identifier": "train-10171-0-1", "sentence": "Zwei Füchse.", "label": "False", "directory": 55},
    {"identifier": "train-0.5-2/3-0", "sentence": "One case.", "label": "True"},
]
DEV = [{"identifier": "dev-850-0-0", "sentence": "A dog.", "label": "False", "validation": {"1": "False"}}]
TEST = [{"identifier": "test1-0-1-0", "sentence": "A cat.", "label": "True"}]


def write_source(root: Path, ending: str = "json", end: str = "\n", bom: bool = False) -> Path:
    for name, records in (("train", TRAIN), ("dev", DEV), ("test1", TEST)):
        write_lines(root / f"{name}.{ending}", records, end, bom)
    return root


def content_of(pair: str, number: int, statement: str, label: bool) -> dict:
    return {"image_id": pair, "identifier": f"{pair}-{number}", "statement": statement, "label": label}


@pytest.mark.parametrize(
    ("ending", "end", "bom"), [("json", "\n", False), ("jsonl", "\r\n", True)], ids=["release", "windows"]
)
def test_each_statement_is_a_sample_of_two_images(tmp_path, ending, end, bom):
    read = convert("nlvr2", write_source(tmp_path, ending, end, bom))
    assert [(split, sample.key, sample.content) for split, sample in read.samples] == [
        ("train", "train-10171-0-0", content_of("train-10171-0", 0, "One case.", True)),
        ("train", "train-10171-0-1", content_of("train-10171-0", 1, "Zwei Füchse.", False)),
        ("train", "train-0_5-2_3-0", content_of("train-0.5-2/3", 0, "One case.", True)),
        ("val", "dev-850-0-0", content_of("dev-850-0", 0, "A dog.", False)),
        ("test", "test1-0-1-0", content_of("test1-0-1", 0, "A cat.", True)),
    ]
    assert not read.omitted


def test_images_lie_where_the_release_has_them(tmp_path):
    images = tmp_path / "images"
    files = [sample.images for _, sample in convert("nlvr2", write_source(tmp_path), images).samples]
    pairs = (
        "images/train/55/train-10171-0",
        "images/train/55/train-10171-0",
        "images/train/train-0.5-2/3",
        "dev/dev-850-0",
        "test1/test1-0-1",
    )
    assert files == [(images / f"{pair}-img0.png", images / f"{pair}-img1.png") for pair in pairs]


LABEL = "one of True, False expected"
ERRORS = [
    (set_at(1, value=["train"]), ": line 2: is ['train']; an object with the field 'identifier' expected"),
    (lose(1, "identifier"), ": line 2: field 'identifier' is missing; str expected"),
    (set_at(1, "identifier", value=""), ": line 2: field 'identifier' is empty; remove the record"),
    *(
        (
            set_at(1, "identifier", value=value),
            f": line 2: field 'identifier' is {value!r}; split-set-pair-sentence expected",
        )
        for value in (
            *("train", "train-7", "train-7-0", "train--0-1", "-7-0-1", "train-7-0-", "a-7-\0-1"),
            *("a-7,8-0-1", "a-7-0\n-1"),
        )
    ),
    (lose(0, "sentence"), ": line 1: field 'sentence' is missing; str expected"),
    (set_at(0, "sentence", value=" "), ": line 1: field 'sentence' is empty; remove the record or give it a text"),
    (lose(2, "label"), ": line 3: field 'label' is missing; str expected"),
    (set_at(2, "label", value="true"), f": line 3: field 'label' is 'true'; {LABEL}"),
    (set_at(2, "label", value=True), ": line 3: field 'label' is True; str expected"),
    (set_at(0, "directory", value="../55"), ": line 1: field 'directory' is '../55'; int expected"),
]


@pytest.mark.parametrize(("change", "expected"), ERRORS, ids=[expected for _, expected in ERRORS])
def test_a_bad_field_is_named(tmp_path, change, expected):
    path = write_lines(write_source(tmp_path) / "train.json", change(TRAIN))
    assert re.match(re.escape(f"{path}{expected}"), error_of("nlvr2", tmp_path))


def test_a_repeated_identifier_is_refused(tmp_path, capfd):
    write_lines(write_source(tmp_path / "source") / "test1.json", [*TEST, TEST[0] | {"label": "False"}])
    assert prepare_shards("nlvr2", "--src", str(tmp_path / "source"), "--out", str(tmp_path / "out")) == 78
    assert "'test1-0-1-0' occurs twice in the source's split test; remove one record" in capfd.readouterr().err


@pytest.mark.parametrize("identifier", ["._a-7-0-1", "__a-7-0-1", "..-7-0-1"])
def test_an_identifier_that_gives_a_key_of_two_underscores_is_a_sample(tmp_path, identifier):
    source = write_source(tmp_path / "source")
    write_lines(source / "test1.json", [*TEST, TEST[0] | {"identifier": identifier}])
    for pair in ("train-10171-0", "train-0.5-2/3", "dev-850-0", "test1-0-1", identifier.rpartition("-")[0]):
        for folder in ("images/train", "images/train/55", "dev", "test1"):
            for side in range(2):
                path = source / folder / f"{pair}-img{side}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(draw_jpeg(side))
    assert prepare_shards("nlvr2", "--src", str(source), "--out", str(tmp_path / "out")) == 0
    index = ShardIndex(tmp_path / "out" / "test")
    assert [json.loads(index.read(0, row)["json"])["identifier"] for row in range(2)] == ["test1-0-1-0", identifier]


@pytest.mark.parametrize("name", ["train.json", "dev.json", "test1.json"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_records_is_named(tmp_path, name, content):
    (write_source(tmp_path) / name).write_text(content)
    assert error_of("nlvr2", tmp_path) == f"{tmp_path / name}: has no record; download it again"


@pytest.mark.parametrize("name", ["train.json", "dev.json", "test1.json"])
def test_a_missing_file_is_named(tmp_path, name):
    (write_source(tmp_path) / name).unlink()
    assert error_of("nlvr2", tmp_path).startswith(f"{tmp_path / name}: cannot be read")


def test_all_that_the_toy_writes_is_read(drawn):
    source = drawn / "nlvr2"
    read = convert("nlvr2", source)
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test1")):
        wanted = [json.loads(line) for line in (source / f"{name}.json").read_text().splitlines()]
        assert wanted
        samples = read.split(split)
        assert [(s.key, s.content["statement"], str(s.content["label"])) for s in samples] == [
            (record["identifier"], record["sentence"], record["label"]) for record in wanted
        ]
        for sample in samples:
            assert [Image.open(file).size for file in sample.images] == [(32, 32), (32, 32)]
