"""CC3M: rows of a table whose images were partly downloaded, or the lists of those that were."""

import re
from pathlib import Path

import pytest

from tests.data.formats.conftest import convert, error_of, write_json, write_lines
from unimo3.data.formats import CONVERTERS
from unimo3.errors import DataError

TRAIN, VAL = "Train_GCC-training.tsv", "Validation_GCC-1.1.0-Validation.tsv"
ROWS = [f"caption {row}\thttp://example.org/{row}.jpg" for row in range(12)]


def write_source(root: Path, end: str = "\n", bom: bool = False, tables: str = ".") -> Path:
    rows = ROWS.copy()
    rows[1] = 'a "quoted , thing" in Kyōto \u2028\thttp://example.org/1.jpg'
    rows[4] = " \thttp://example.org/4.jpg"
    write_lines(root / tables / TRAIN, rows, end, bom)
    write_lines(root / tables / VAL, ROWS[:2], end, bom)
    # As os.listdir gives them: in no order.
    names = ["00000007.jpg", "00000001.jpg", "00000004.jpg", "00000010.png", "2.jpg", "00000011.jpg"]
    write_lines(root / "train_image_exist.txt", [f"../train_image/{name}" for name in names] + [""], end, bom)
    write_lines(root / "val_image_exist.txt", ["00000000.jpg"], end, bom)
    return root


@pytest.mark.parametrize(("end", "bom"), [("\n", False), ("\r\n", True)], ids=["unix", "windows"])
@pytest.mark.parametrize("tables", [".", "utils"])
def test_rows_are_joined_with_the_images_named_after_them(tmp_path, end, bom, tables):
    write_source(tmp_path, end, bom, tables)
    read = convert("cc3m", tmp_path, tmp_path / "images")
    folder = tmp_path / "images" / "train_image"
    assert [(sample.key, sample.images, sample.content) for sample in read.split("train")] == [
        (f"{row:09d}", (folder / name,), {"image_id": row, "captions": [caption]})
        for row, name, caption in (
            (1, "00000001.jpg", 'a "quoted , thing" in Kyōto'),
            (2, "2.jpg", "caption 2"),
            (7, "00000007.jpg", "caption 7"),
            (10, "00000010.png", "caption 10"),
            (11, "00000011.jpg", "caption 11"),
        )
    ]
    (sample,) = read.split("val")
    assert sample.images == (tmp_path / "images" / "val_image" / "00000000.jpg",)
    assert sample.content == {"image_id": 0, "captions": ["caption 0"]}
    assert read.omitted == {"empty caption": 1, "image not downloaded": 7}


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    write_source(tmp_path)
    write_lines(tmp_path / TRAIN, [*ROWS[:5], "no url", *ROWS[6:]])
    samples = CONVERTERS["cc3m"](tmp_path, tmp_path)
    assert [next(samples)[1].key for _ in range(3)] == ["000000001", "000000002", "000000004"]
    with pytest.raises(DataError, match="line 6: has 1 columns"):
        next(samples)


def test_empty_lines_at_the_end_are_no_rows(tmp_path):
    write_source(tmp_path)
    before = convert("cc3m", tmp_path)
    (tmp_path / TRAIN).write_text((tmp_path / TRAIN).read_text() + "\n \n")
    assert convert("cc3m", tmp_path) == before


@pytest.mark.parametrize("content", ["", "\n"])
def test_a_table_without_rows_is_named(tmp_path, content):
    write_source(tmp_path)
    (tmp_path / VAL).write_text(content)
    (tmp_path / "val_image_exist.txt").write_text("")
    assert error_of("cc3m", tmp_path) == f"{tmp_path / VAL}: has no row; download it again"


@pytest.mark.parametrize("names", [["0", "9", "10", "11"], ["11", "10", "9", "0"], ["00", "9", "010", "11"]])
def test_image_names_may_have_any_number_of_digits_and_no_suffix(tmp_path, names):
    write_source(tmp_path)
    write_lines(tmp_path / "train_image_exist.txt", names)
    files = {sample.key: sample.images[0].name for sample in convert("cc3m", tmp_path).split("train")}
    assert files == {f"{int(name):09d}": name for name in names}


def test_a_list_of_downloads_overrides_the_table_for_each_split(tmp_path):
    write_source(tmp_path)
    (tmp_path / "images_val" / "0000").mkdir(parents=True)
    annot = [["images_val/0000/0000000", "one"], ["images_val/0000/0000001", ""], ["nowhere/0000002", "three"]]
    write_json(tmp_path / "val_annot.json", annot, bom=True)
    read = convert("cc3m", tmp_path)
    assert len(read.split("train")) == 5
    assert [(sample.key, sample.images, sample.content) for sample in read.split("val")] == [
        ("000000000", (tmp_path / "images_val" / "0000" / "0000000",), {"image_id": 0, "captions": ["one"]}),
        ("000000002", (tmp_path / "0000002",), {"image_id": 2, "captions": ["three"]}),
    ]
    assert read.omitted == {"empty caption": 2, "image not downloaded": 6}


@pytest.mark.parametrize(
    ("row", "line", "expected"),
    [
        (3, "no url", ": line 4: has 1 columns ('no url'); caption<TAB>url expected, as released"),
        (3, "a\tb\tc", ": line 4: has 3 columns ('a\\tb\\tc'); caption<TAB>url expected"),
        (3, "", ": line 4: is empty; images are numbered by the rows of the release: download it again"),
        (0, "caption\turl", ": line 1: is a header, or no row of the release ('caption\\turl'); caption<TAB>url"),
        (0, '"caption"\t"url"', ': line 1: is a header, or no row of the release (\'"caption"\\t"url"\'); caption'),
        (0, "Caption\tImage_URL", ": line 1: is a header, or no row of the release ('Caption\\tImage_URL'); caption"),
        (3, '"a dog"\t"http://a.org/1.jpg"', ": line 4: is no row of the release ("),
        (3, "http://a.org/1.jpg\ta dog", ": line 4: is no row of the release ("),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, line, expected):
    write_source(tmp_path)
    rows = ROWS.copy()
    rows[row] = line
    path = write_lines(tmp_path / TRAIN, rows)
    assert re.match(re.escape(f"{path}{expected}"), error_of("cc3m", tmp_path))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train_image/dog.jpg", "is 'dog.jpg'; an image named after its row expected, such as 00000042.jpg"),
        ("train_image/-1.jpg", "is '-1.jpg'; an image named after its row expected"),
        ("00000012.jpg", f"is '00000012.jpg', {TRAIN} has 12 rows; use one release"),
        ("9" * 5000, f"is '999999999999...9999999999999', {TRAIN} has 12 rows; use one release"),
        ("0001.png", "is '0001.png', an image of row 1 precedes it; remove one of them"),
    ],
)
def test_a_bad_name_of_an_image_is_named(tmp_path, line, expected):
    write_source(tmp_path)
    path = write_lines(tmp_path / "train_image_exist.txt", ["00000001.jpg", line])
    assert re.match(re.escape(f"{path}: line 2: {expected}"), error_of("cc3m", tmp_path))


@pytest.mark.parametrize("name", [TRAIN, VAL, "train_image_exist.txt", "val_image_exist.txt"])
def test_a_missing_file_is_named(tmp_path, name):
    write_source(tmp_path)
    (tmp_path / name).unlink()
    expected = f"{tmp_path / name}: cannot be read (No such file or directory); --src must name"
    assert re.match(re.escape(expected), error_of("cc3m", tmp_path))
