"""SugarCrepe: a photo of COCO with two captions, a file a category."""

import re
from pathlib import Path

import pytest

from tests.data.conftest import convert as prepare_shards
from tests.data.conftest import draw_jpeg
from tests.data.formats.conftest import convert, error_of, lose, set_at, write_json
from unimo3.data.formats.sugarcrepe import CATEGORIES
from unimo3.data.index import REJECTS, ShardIndex

RECORDS = {
    "0": {"filename": "000000085329.jpg", "caption": "A red car. ", "negative_caption": "A blue car."},
    "245": {"filename": "000000222235.jpg", "caption": "Ein Fuchs.", "negative_caption": "Kein Fuchs."},
}


def write_source(root: Path, bom: bool = False) -> Path:
    for category in CATEGORIES:
        write_json(root / f"{category}.json", RECORDS, bom)
    return root


@pytest.mark.parametrize("bom", [False, True], ids=["release", "windows"])
def test_each_example_is_a_sample_with_its_own_caption_first(tmp_path, bom):
    read = convert("sugarcrepe", write_source(tmp_path, bom))
    assert {split for split, _ in read.samples} == {"test"}
    assert [sample.key for _, sample in read.samples] == [f"{name}-{n}" for name in CATEGORIES for n in ("0", "245")]
    _, sample = read.samples[-2]
    assert sample.content == {
        "identifier": "swap_obj-0",
        "category": "swap_obj",
        "image_id": "000000085329",
        "choices": [{"text": "A red car.", "image": 0}, {"text": "A blue car.", "image": None}],
    }
    assert sample.ids == ("swap_obj-0",)


@pytest.mark.parametrize("folder", ["val2017", "."])
def test_photos_lie_in_val2017_or_in_the_folder_itself(tmp_path, folder):
    (tmp_path / "photos" / folder).mkdir(parents=True)
    (_, sample), *_ = convert("sugarcrepe", write_source(tmp_path), tmp_path / "photos").samples
    assert sample.images == (tmp_path / "photos" / folder / "000000085329.jpg",)


ERRORS = [
    (set_at("0", value=[]), ": '0': is []; an object with the field 'filename' expected"),
    (lose("245", "caption"), ": '245': field 'caption' is missing; str expected"),
    (set_at("0", "negative_caption", value=" "), ": '0': field 'negative_caption' is empty; remove the record"),
    (set_at("0", "filename", value="../1.jpg"), ": '0': field 'filename' is '../1.jpg'; a file's name without"),
    (set_at("0", "filename", value=7), ": '0': field 'filename' is 7; str expected"),
    (lambda _: {}, ": has no record; download it again"),
    (lambda _: [], ": is []; dict expected as the outermost value"),
]


@pytest.mark.parametrize(("change", "expected"), ERRORS, ids=[expected for _, expected in ERRORS])
def test_a_bad_record_is_named(tmp_path, change, expected):
    path = write_json(write_source(tmp_path) / "swap_att.json", change(RECORDS))
    assert re.match(re.escape(f"{path}{expected}"), error_of("sugarcrepe", tmp_path))


def test_missing_photos_are_counted_and_listed(tmp_path, capfd):
    source = write_source(tmp_path / "source")
    (source / "000000085329.jpg").write_bytes(draw_jpeg(1))
    arguments = ("sugarcrepe", "--src", str(source), "--out", str(tmp_path / "out"))
    assert prepare_shards(*arguments) == 78
    assert "--max-reject-ratio 0: 7 of 14 records of test cannot be used" in capfd.readouterr().err
    assert prepare_shards(*arguments, "--max-reject-ratio", "0.5") == 0
    assert len((tmp_path / "out" / REJECTS).read_text().splitlines()) == 7
    index = ShardIndex(tmp_path / "out" / "test")
    assert sum(index.samples_per_shard) == 7
    assert sorted(index.missing_ids) == sorted(f"{category}-245" for category in CATEGORIES)
