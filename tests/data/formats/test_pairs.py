"""Own pairs: tables of every kind, folders, splits by image, and rows that cannot be used."""

import csv
import json
import re
from collections import Counter
from functools import partial

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import draw_jpeg
from tests.data.mutations import damaged, property_settings, result_of
from unimo3.data.formats.pairs import PairsOptions, convert
from unimo3.data.formats.tables import TableOptions
from unimo3.data.index import ShardIndex
from unimo3.errors import ConfigError, DataError

ROWS = [
    {"image": "a.jpg", "caption": "a dog"},
    {"image": "b.jpg", "caption": 'he shouts "hi", twice'},
    {"image": "a.jpg", "caption": "  une  «bête»\n"},
    {"image": "a.jpg", "caption": "a dog"},
]
CONTENTS = [
    ("a.jpg", {"image_id": 0, "captions": ["a dog", "une  «bête»"]}),
    ("b.jpg", {"image_id": 1, "captions": ['he shouts "hi", twice']}),
]


def write_csv(path, rows, encoding="utf-8", **details):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), **details)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def read(source, images=None, **options):
    """(split, image's path, content or problem) of each record."""
    images = images or (source if source.is_dir() else source.parent)
    samples = list(convert(source, images, options=PairsOptions(**options)))
    return [(split, sample.images[0], sample.problem or sample.content) for split, sample in samples]


def problems(source, **options):
    """The reasons of the bad rows, and how many rows are good."""
    records = read(source, **options)
    return [record for _, _, record in records if isinstance(record, str)], len(
        [record for _, _, record in records if not isinstance(record, str)]
    )


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("pairs.csv", write_csv),
        ("pairs.CSV", partial(write_csv, encoding="utf-8-sig", lineterminator="\r\n")),
        ("pairs.tsv", partial(write_csv, delimiter="\t")),
        ("pairs.jsonl", write_jsonl),
        ("pairs.parquet", write_parquet),
    ],
)
def test_every_kind_of_table_gives_an_images_captions(tmp_path, name, write):
    source = write(tmp_path / name, ROWS)
    assert read(source) == [("train", tmp_path / image, content) for image, content in CONTENTS]
    assert read(source, images=tmp_path / "x")[0][1] == tmp_path / "x" / "a.jpg"


def test_separator_encoding_and_quotes_are_as_pythons_csv_has_them(tmp_path):
    source = write_csv(tmp_path / "pairs.csv", ROWS, encoding="latin-1", delimiter=";")
    table = TableOptions(separator=";", encoding="latin-1")
    assert [content for _, _, content in read(source, table=table)] == [content for _, content in CONTENTS]
    with pytest.raises(ConfigError, match="--encoding klingon: unknown encoding"):
        read(source, table=TableOptions(encoding="klingon"))
    source.write_text('image,caption\na.jpg,"fur" is soft\nb.jpg,5" screen\n')
    captions = [content["captions"] for _, _, content in read(source, table=TableOptions(has_quotes=False))]
    assert captions == [['"fur" is soft'], ['5" screen']]


def rejected(source, **options):
    """The bad rows' positions and reasons, and the images of the good rows."""
    records = read(source, **options)
    bad = [(path.name, record) for _, path, record in records if isinstance(record, str)]
    return bad, [path.name for _, path, record in records if not isinstance(record, str)]


QUOTE = "double the quotes inside a quoted field, or give --no-quotes"
BYTE = r"is not utf-8 \(byte 0xea\); give the file's --encoding, or correct this line"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'b.jpg,"fur" is soft', f"expected after '\"'; {QUOTE}"),
        (b'b.jpg,"never closed', QUOTE),
        (b'b.jpg,"never closed "", ""', QUOTE),
        (b'b.jpg,"two\nlines" and more', QUOTE),
        ("b.jpg,une bête".encode("latin-1"), BYTE),
        ('b.jpg,"une\nbête"'.encode("latin-1"), BYTE),
        ('b.jpg,"une bête'.encode("latin-1"), BYTE),
        (b"b.jpg," + b"x" * (2**24 + 1), rf"larger than field limit \({2**24}\); {QUOTE}"),
    ],
    ids=["quoted word", "not closed", "doubled", "closed early", "byte", "byte in lines", "byte and quote", "too long"],
)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_row_that_cannot_be_read_ends_neither_file_nor_neighbours(tmp_path, row, reason, line_end):
    source = tmp_path / "p.csv"
    others = b'c.jpg,"it is ""hi"", twice"', b'd.jpg,"two\nlines"', b"e.jpg,x"
    source.write_bytes(line_end.join([b"image,caption", b"a.jpg,x", row, *others, b""]))
    bad, good = rejected(source)
    assert bad[0][0] == "p.csv: line 3"
    assert re.search(reason, bad[0][1])
    assert good == ["a.jpg", "c.jpg", "d.jpg", "e.jpg"]
    # The rest of a record whose quote is closed too early.
    assert [where for where, _ in bad[1:]] == ["p.csv: line 4"] * (row.count(b"\n") and b"more" in row)


def test_long_fields_and_quotes_in_the_last_row(tmp_path):
    source = tmp_path / "p.csv"
    source.write_text(f'image,thumbnail,caption\na.jpg,{"x" * 200_000},long\nb.jpg,,"never closed\nc.jpg,,x')
    assert rejected(source) == (
        [("p.csv: line 3", f"unexpected end of data; {QUOTE} if they are part of texts")],
        [
            "a.jpg",
            "c.jpg",
        ],
    )


def test_a_file_of_another_encoding_names_the_option_and_the_line(tmp_path):
    source = write_csv(tmp_path / "p.csv", ROWS[:2], encoding="utf-16")
    with pytest.raises(DataError, match=r"p\.csv: line 1: is not utf-8 \(byte 0xff\); give the file's --encoding"):
        read(source)
    assert len(read(source, table=TableOptions(encoding="utf-16"))) == 2
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"is not utf-16 \(.*truncated data.*\); give its --encoding"):
        read(source, table=TableOptions(encoding="utf-16"))
    source.write_text('image,cap"tion\n')
    assert rejected(source, caption_columns=('cap"tion',)) == ([], [])
    source.write_text('image,"caption" \na.jpg,x\n')
    with pytest.raises(DataError, match=r"p\.csv: line 1: .*--no-quotes"):
        read(source)


def test_columns_ids_and_lists_of_captions(tmp_path):
    rows = [
        {"file": "http://host/x/a%20b.jpg?w=1", "alt": ["one", "two"], "title": None, "id": 7.0},
        {"file": "/data/c.jpg", "alt": [], "title": "three", "id": 8},
        {"file": "http://other/a%20b.jpg", "alt": ["two", " "], "title": "four", "id": 7},
    ]
    columns = {"image_column": "file", "caption_columns": ("title", "alt"), "id_column": "id"}
    for source in (write_jsonl(tmp_path / "p.jsonl", rows), write_parquet(tmp_path / "p.parquet", rows)):
        assert [(str(path), content) for _, path, content in read(source, **columns)] == [
            (f"{tmp_path}/a b.jpg", {"image_id": 7, "captions": ["one", "two", "four"]}),
            ("/data/c.jpg", {"image_id": 8, "captions": ["three"]}),
        ]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_missing_column_is_an_error_that_lists_the_columns(tmp_path, ending):
    write = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}[ending]
    source = write(tmp_path / f"p.{ending}", [{"filepath": "a.jpg", "title": "a dog"}])
    with pytest.raises(DataError) as caught:
        read(source)
    assert str(caught.value).startswith(f"{source}: has no column 'image'; its columns are 'filepath', 'title'; give")
    assert len(read(source, image_column="filepath", caption_columns=("title",))) == 1


def test_a_header_with_another_separator_names_the_option(tmp_path):
    source = write_csv(tmp_path / "p.csv", ROWS, delimiter=";")
    with pytest.raises(DataError, match=r"columns are 'image;caption'; .*, or --separator ';' if it separates columns"):
        read(source)


def test_a_repeated_column_is_an_error(tmp_path):
    (tmp_path / "p.csv").write_text("image,caption,caption\na.jpg,x,y\n")
    with pytest.raises(DataError, match="has several columns named 'caption'"):
        read(tmp_path / "p.csv")


def test_a_file_that_is_no_table_is_refused(tmp_path):
    for name, content, message in (
        ("p.xlsx", b"x", r"is not a table; name a folder or a file that ends in \.csv, \.tsv, \.jsonl, \.parquet"),
        ("p.parquet", b"PAR1 but not really PAR1", "is not Parquet, or is damaged"),
        ("p.csv", b"", "is empty; a line with the names of the columns is needed"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)


def test_bad_rows_are_rejected_with_their_reason(tmp_path):
    (tmp_path / "p.csv").write_text("image,caption\na.jpg,good\nb.jpg\n,text\nc.jpg,  \n\nd.jpg,x,y\ne.jpg,good\n")
    assert problems(tmp_path / "p.csv") == (
        [
            "has 1 columns, the header has 2",
            "has no image in 'image'",
            "has no caption in 'caption'",
            "has 3 columns, the header has 2",
        ],
        2,
    )
    where = [path.name for _, path, record in read(tmp_path / "p.csv") if isinstance(record, str)]
    assert where == ["p.csv: line 3", "p.csv: line 4", "p.csv: line 5", "p.csv: line 7"]
    lines = ['{"image": "a.jpg", "caption": "x"}', "{", "[1]", '{"image": 3, "caption": "x"}', '{"image": "a.jpg"}']
    lines += ['{"image": "b.jpg", "caption": {"en": "x"}}', '{"image": "http://[/a", "caption": "x"}', '"\\ud83d"']
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    reasons, num_good = problems(tmp_path / "p.jsonl")
    assert num_good == 1
    assert [reason.split(" (")[0] for reason in reasons] == [
        "is not JSON",
        "is not a JSON object",
        "has no image in 'image'",
        "has no caption in 'caption'",
        "caption in 'caption' is {'en': 'x'}; a text or a list of texts expected",
        "URL in 'image' does not end in a file name",
        "is not a JSON object",
    ]


def test_ids_that_do_not_name_one_image_are_bad_rows(tmp_path):
    ids = [1, "1", None, True, "", 2.5, 3]
    rows = [{"image": f"{number // 2}.jpg", "caption": "x", "id": value} for number, value in enumerate(ids)]
    reasons, num_good = problems(
        write_jsonl(tmp_path / "p.jsonl", [*rows, rows[-1] | {"image": "other.jpg"}]), id_column="id"
    )
    assert num_good == 2
    assert reasons[:4] == [f"id in 'id' is {value!r}; a number or a text expected" for value in (None, True, "", 2.5)]
    assert reasons[4] == f"'id' 3 is 3.jpg at {tmp_path}/p.jsonl: line 7"


def test_a_column_names_the_splits(tmp_path):
    rows = [
        {"image": f"{number}.jpg", "caption": "x", "split": split}
        for number, split in enumerate(["train", "val", "a/b", ""])
    ]
    source = write_csv(tmp_path / "p.csv", rows)
    assert [
        (split, path.name) for split, path, record in read(source, split_column="split") if isinstance(record, dict)
    ] == [
        ("train", "0.jpg"),
        ("val", "1.jpg"),
    ]
    assert problems(source, split_column="split")[0] == [
        f"split in 'split' is {split!r}; letters, digits, - and _ expected" for split in ("a/b", "")
    ]
    write_csv(source, [*rows[:2], rows[0] | {"split": "test"}])
    with pytest.raises(
        DataError, match=r"0\.jpg is in the splits train \(.*line 2\) and test; held-out images must not"
    ):
        read(source, split_column="split")


def test_a_seeded_fraction_is_held_out_by_image(tmp_path):
    rows = [{"image": f"./{number % 500}.jpg", "caption": f"text {number}"} for number in range(1000)]
    source = write_csv(tmp_path / "p.csv", rows)

    def held_out(source, **options):
        return {path.name for split, path, _ in read(source, val_ratio=0.1, **options) if split == "val"}

    val = held_out(source)
    assert 30 < len(val) < 75
    train = {path.name for split, path, _ in read(source, val_ratio=0.1) if split == "train"}
    assert not val & train
    assert len(val | train) == 500
    assert held_out(source, seed=1) != val
    # Neither the folder, nor the order, nor further rows move an image to the other split.
    (tmp_path / "moved").mkdir()
    more = [{"image": f"{number}.jpg", "caption": "x"} for number in range(600)]
    moved = held_out(write_csv(tmp_path / "moved" / "q.csv", more[::-1]))
    assert {name for name in moved if int(name.split(".")[0]) < 500} == val
    with pytest.raises(DataError, match=r"--val-ratio 1e-09: all 500 images are in train; choose another ratio"):
        read(source, val_ratio=1e-9)


def test_a_folder_of_images_with_text_files_is_read(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jpg", "a.PNG", "sub/c.webp", "no_text.jpg", "latin.jpg", ".hidden.jpg"):
        (tmp_path / name).write_bytes(draw_jpeg(1))
    for name, text in (("b", "a dog\n\n it runs \n"), ("a", "\ufeffone"), ("sub/c", "two"), ("alone", "x")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "latin.txt").write_bytes("bête".encode("latin-1"))
    (tmp_path / "notes.md").write_text("x")
    assert read(tmp_path) == [
        ("train", tmp_path / "a.PNG", {"image_id": 0, "captions": ["one"]}),
        ("train", tmp_path / "b.jpg", {"image_id": 1, "captions": ["a dog", "it runs"]}),
        ("train", tmp_path / "sub" / "c.webp", {"image_id": 4, "captions": ["two"]}),
        ("train", tmp_path / "latin.jpg", "latin.txt is not utf-8; give its --encoding"),
        ("train", tmp_path / "no_text.jpg", "no_text.txt cannot be read (No such file or directory)"),
    ]
    omitted = Counter()
    list(convert(tmp_path, tmp_path, omitted))
    assert omitted == {"neither an image nor its text file": 2}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no image; name a table, or a folder of images"):
        read(tmp_path / "empty")


def test_bad_rows_and_images_count_towards_the_limit(tmp_path):
    rows = [{"image": f"{number}.jpg", "caption": "a dog"} for number in range(8)]
    for row in rows[:6]:
        (tmp_path / row["image"]).write_bytes(draw_jpeg(1))
    source = write_csv(tmp_path / "p.csv", [*rows[:7], rows[7] | {"caption": ""}])
    out = tmp_path / "out"
    status, error = result_of("pairs", "--src", str(source), "--out", str(out), "--max-reject-ratio", "0.2")
    assert status == 78
    assert "--max-reject-ratio 0.2: 2 of 8 records of train cannot be used (such as" in error
    status, error = result_of("pairs", "--src", str(source), "--out", str(out), "--max-reject-ratio", "0.25")
    assert (status, error) == (0, "")
    assert sum(ShardIndex(out / "train").samples_per_shard) == 6
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {(reject["image"], reject["reason"].split(" (")[0].split(" in ")[0]) for reject in rejects} == {
        (str(tmp_path / "6.jpg"), "cannot be read"),
        (f"{source}: line 9", "has no caption"),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("coco", "--val-ratio", "0.1"), "--val-ratio: is an option of pairs only"),
        (("pairs", "--val-ratio", "1"), "--val-ratio 1.0: at least 0 and below 1 is needed"),
        (("pairs", "--val-ratio", "0.1", "--split-column", "s"), "--split-column decides already; leave one out"),
        (("pairs", "--separator", "::"), "--separator '::': one character is needed"),
        (("pairs", "--no-quotes"), "--no-quotes: is for a table, and --src"),
        (("pairs", "--images", "."), "--images: is for a table, and --src"),
    ],
)
def test_options_that_do_not_fit_are_errors(tmp_path, arguments, message):
    status, error = result_of(*arguments, "--src", str(tmp_path), "--out", str(tmp_path / "out"))
    assert status == 78
    assert message in error


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.parquet"])
@settings(property_settings, max_examples=60)
@given(data=st.data())
def test_a_damaged_table_is_read_or_refused(tmp_path_factory, name, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    write = {"p.csv": write_csv, "p.jsonl": write_jsonl, "p.parquet": write_parquet}[name]
    source = write(folder / name, [row | {"id": number} for number, row in enumerate(ROWS)])
    source.write_bytes(data.draw(damaged(source.read_bytes())))
    try:
        records = read(source, id_column="id", val_ratio=0.0)
    except DataError as error:
        assert str(source) in str(error)  # noqa: PT017
    else:
        assert len(records) <= len(ROWS) + 2
        json.dumps([content for _, _, content in records]).encode()
