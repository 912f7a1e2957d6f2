"""Units of reading are counted by the kind that is read, also in indexes of version 2."""

import dataclasses
import hashlib
import io
import json
import re
import tarfile

import numpy as np
import pytest

from benchmarks.scale_data import write_version_3
from tests.data.conftest import convert, index_again, write_tar
from tests.data.test_identity import described
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.args import DataArgs
from unimo3.data.index import ShardIndex
from unimo3.data.loader import ReaderArgs, TrainingLoader, evaluation_batches
from unimo3.data.members import Members, scan
from unimo3.data.order import SampleOrder
from unimo3.data.samples import VqaSamples
from unimo3.data.shards import index_tar
from unimo3.data.statements import EntailmentSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.errors import DataError

READER = ReaderArgs(0, 1)


@pytest.fixture(scope="module")
def tokenizer(coco):
    return load_tokenizer(str(coco / "tokenizer"))


def questions(*ids):
    return [{"question_id": identity, "question": f"is it {identity}?", "answers": ["yes"]} for identity in ids]


def hypotheses(*ids):
    return [{"pair_id": identity, "text": f"it is {identity}", "label": "neutral"} for identity in ids]


def write(folder, *contents):
    write_tar(folder / "0.tar", [(str(number), described(number, content)) for number, content in enumerate(contents)])
    index_again(folder)
    return folder


def vqa(folder, tokenizer):
    return VqaSamples(ShardIndex(folder), tokenizer, 12, ImageTransform(16), AnswerVocabulary(["yes"]), 0)


def evaluated(samples):
    """All units, once."""
    return [
        row
        for batch, counts in evaluation_batches(samples, 0, 1, 2, READER)
        for row, is_counted in zip(batch.get("question") or batch["pair_id"], counts.tolist(), strict=True)
        if is_counted
    ]


def test_questions_next_to_other_lists_are_all_read(tmp_path, tokenizer):
    folder = write(
        tmp_path,
        {"captions": ["a"], "questions": questions(1, 2, 3)},
        {"captions": [], "questions": questions(4)},
        {"captions": ["a"] * 5, "questions": questions(5, 6), "hypotheses": hypotheses("x")},
        {"captions": ["a"], "questions": []},
        {"captions": "a text", "questions": questions(7)},
        {"captions": ["a"], "questions": None},
    )
    samples = vqa(folder, tokenizer)
    assert samples.units_per_shard == [7]
    assert [question["question_id"] for question in evaluated(samples)] == [1, 2, 3, 4, 5, 6, 7]
    order = SampleOrder(samples.units_per_shard, 0, 1)
    (batch,) = next(iter(TrainingLoader([samples], order, 7, 7, 0, 1, READER)))
    assert sorted(question["question_id"] for question in batch["question"]) == [1, 2, 3, 4, 5, 6, 7]
    assert batch["num_replaced"] == 0


def test_hypotheses_next_to_other_lists_are_all_read(tmp_path, tokenizer):
    folder = write(
        tmp_path,
        {"captions": ["a"], "hypotheses": hypotheses("b", "c")},
        {"questions": questions(1, 2, 3), "hypotheses": hypotheses("d")},
    )
    assert evaluated(EntailmentSamples(ShardIndex(folder), tokenizer, 12, ImageTransform(16), 0)) == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"questions": [', "sample 1#0 its json cannot be read"),
        (b"[" * 100_000, "sample 1#0 its json cannot be read"),
        ([1], "sample 1#0 its json is a list"),
        ({"questions": questions(2)[0]}, "sample 1#0 its questions are a dict; a list is needed"),
    ],
    ids=["half", "deep", "list", "dict"],
)
def test_questions_that_cannot_be_read_are_units_and_errors(tmp_path, tokenizer, content, expected):
    folder = write(tmp_path, {"questions": questions(1)}, content, {"questions": questions(3, 4)})
    samples = vqa(folder, tokenizer)
    with pytest.raises(DataError, match=expected):
        evaluated(samples)
    order = SampleOrder(samples.units_per_shard, 0, 1)
    (batch,) = next(iter(TrainingLoader([samples], order, 4, 4, 0, 1, READER)))
    assert batch["num_replaced"] == 1


def as_version_2(folder, *counts):
    """The index as it was written before, with one count for each sample: of the first list that its json has."""
    table = dataclasses.replace(scan(folder / "0.tar"), num_items=np.asarray(counts)).to_bytes()
    path = write_version_3(folder)
    (folder / "index.members").write_bytes(table)
    digest = hashlib.sha256(table).hexdigest()
    content = json.loads(path.read_text())
    content["shards"][0] |= {"num_items": sum(counts), "table": [0, len(table), digest]}
    content |= {"version": 2, "num_items": sum(counts), "members_sha256": digest}
    del content["missing_ids"]
    path.write_text(json.dumps(content))
    return folder


def test_an_index_of_version_2_is_read(tmp_path, tokenizer):
    folder = as_version_2(write(tmp_path, {"questions": questions(1, 2)}, {"questions": questions(3)}), 2, 1)
    assert DataArgs(train=str(folder)).shard_errors("questions") == []
    assert [question["question_id"] for question in evaluated(vqa(folder, tokenizer))] == [1, 2, 3]


@pytest.mark.parametrize("captions", [["a"], ["a"] * 5])
def test_a_wrong_count_of_version_2_is_an_error(tmp_path, tokenizer, captions):
    content = {"questions": questions(1, 2, 3), "captions": captions}
    folder = as_version_2(write(tmp_path, content), len(captions))
    expected = rf"index\.json: counts {len(captions)} questions of sample 0 of 0\.tar, which has 3"
    with pytest.raises(DataError, match=expected):
        evaluated(vqa(folder, tokenizer))


def test_items_that_version_2_does_not_count_are_an_error(tmp_path):
    contents = ({"questions": questions(1)}, {"captions": ["a"]}, {"captions": [], "questions": questions(2)})
    folder = as_version_2(write(tmp_path, *contents[:2]), 1, 0)
    assert DataArgs(train=str(folder)).shard_errors("questions") == []
    folder = as_version_2(write(tmp_path, *contents), 1, 0, 0)
    (problem,) = DataArgs(train=str(folder)).shard_errors("questions")
    assert "index.json: counts 0 questions of sample 2 of 0.tar, which has 1" in problem


def joined_and_indexed_by_version_2(folder, tail):
    """A tar with one sample that is indexed, and what follows it in the file."""
    folder = as_version_2(write(folder, {"questions": questions(1), "captions": ["a"]}), 1)
    tar, path = folder / "0.tar", folder / "index.json"
    tar.write_bytes(tar.read_bytes() + tail)
    content = json.loads(path.read_text())
    content["shards"][0] |= {"bytes": tar.stat().st_size, "sha256": hashlib.sha256(tar.read_bytes()).hexdigest()}
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("padding", [0, 512, 3 * 2**20])
def test_a_joined_tar_of_version_2_is_an_error(tmp_path, padding, capfd):
    tail = bytes(padding) + write_tar(tmp_path / "b", {"b": described(2, {"captions": ["b"]})}).read_bytes()
    (tmp_path / "c").mkdir()
    folder = joined_and_indexed_by_version_2(tmp_path / "c", tail)
    expected = r"0\.tar: is not the tar that was indexed: another tar follows .*; index it again"
    with pytest.raises(DataError, match=expected):
        ShardIndex(folder).read(0, 0)
    for kind in ("captions", "questions"):
        (problem,) = DataArgs(train=str(folder)).shard_errors(kind)
        assert re.search(expected, problem)
    assert convert("index", "--src", str(folder), "--verify") == 78
    assert "0.tar: another tar follows the one that was indexed" in capfd.readouterr().err
    assert convert("index", "--src", str(folder)) == 0
    assert ShardIndex(folder).samples_per_shard == [2]


def test_a_tar_of_version_2_may_end_in_anything_but_samples(tmp_path):
    folder = joined_and_indexed_by_version_2(tmp_path, bytes(2**20 + 512))
    assert DataArgs(train=str(folder)).shard_errors("captions") == []
    assert convert("index", "--src", str(folder), "--verify") == 0
    with tarfile.open(folder / "0.tar", "a") as tar:
        for name in ("README", "__info__.json", "x" * 300):
            tar.addfile(tarfile.TarInfo(name))
    folder = joined_and_indexed_by_version_2(tmp_path, b"")
    assert DataArgs(train=str(folder)).shard_errors("captions") == []


@pytest.mark.parametrize("damaged", [b'{"questions": [', b"[" * 100_000, b"\xff", [1], b"null"])
def test_a_json_that_version_2_could_not_count_is_a_bad_sample(tmp_path, damaged, caplog):
    folder = as_version_2(write(tmp_path, {"questions": questions(1, 2)}, damaged), 2, 0)
    assert DataArgs(train=str(folder)).shard_errors("questions") == []
    expected = "its index counts no questions of 1 samples whose json cannot be read, such as 0.tar: 1; "
    assert f"{expected}they are not trained on" in caplog.text
    # Held-out data is scored completely.
    (problem,) = DataArgs(train=str(folder), val=str(folder)).shard_errors("questions")
    assert problem.startswith("data.val: ")
    assert f"{expected}held-out samples must all be scored" in problem


@pytest.mark.parametrize(
    ("content", "count"),
    [
        ({"captions": ["a"]}, 1),
        ({"captions": ["a"] * 3}, 3),
        ({"hypotheses": hypotheses("b")}, 1),
        ({"questions": None}, 1),
    ],
)
def test_items_of_other_kinds_that_version_2_counts_are_an_error(tmp_path, tokenizer, content, count):
    folder = as_version_2(write(tmp_path, {"questions": questions(1)}, content), 1, count)
    samples, expected = (
        vqa(folder, tokenizer),
        rf"counts {count} questions of sample 1 of 0\.tar, which has 0; index it again",
    )
    with pytest.raises(DataError, match=expected):
        evaluated(samples)
    order = SampleOrder(samples.units_per_shard, 0, 1)
    with pytest.raises(DataError, match=expected):
        next(iter(TrainingLoader([samples], order, 1 + count, 1 + count, 0, 1, READER)))


def test_a_table_that_an_older_version_left_is_made_again(tmp_path):
    folder = write(tmp_path, {"captions": ["a"], "questions": questions(1, 2)})
    index_tar(folder / "0.tar")
    note = folder / "0.unimo3-done"
    content = json.loads(note.read_text())
    content["table"]["num_items"] = 1
    note.write_text(json.dumps(content))
    assert convert("index", "--src", str(folder)) == 0
    assert ShardIndex(folder).items_per_shard("questions") == [2]


def test_an_index_that_counts_no_unit_is_refused_before_it_is_read(tmp_path):
    folder = as_version_2(write(tmp_path, {"questions": questions(1)}), 0)
    (problem,) = DataArgs(train=str(folder)).shard_errors("questions")
    assert "its index counts no questions" in problem


def test_one_long_key_does_not_widen_the_others(tmp_path):
    keys = [f"{number:04d}" for number in range(2000)] + ["d/" * 10_000 + "x", "é", "\udce9"]
    members = scan(write_tar(tmp_path / "0.tar", {key: {"txt": b"a"} for key in keys}))
    content = members.to_bytes()
    assert len(content) < 2003 * 64 + 2 * 20_001
    for table in (members, Members.from_bytes(content)):
        assert [table.key(row) for row in range(2003)] == [
            key.encode("utf-8", "backslashreplace").decode() for key in keys
        ]
        assert table.to_bytes() == content


def test_a_table_with_keys_of_one_width_is_read(tmp_path):
    members = scan(write_tar(tmp_path / "0.tar", {key: {"txt": b"a"} for key in ("a", "é" * 30, "v1.0/bcd")}))
    file = io.BytesIO()
    keys = np.asarray([b"a", "é".encode() * 30, b"v1.0/bcd"], dtype=np.bytes_)
    arrays = {name: getattr(members, name) for name in ("offsets", "sizes", "num_items")}
    np.savez(file, keys=keys, extensions=np.asarray(members.extensions, dtype=np.str_), **arrays)
    assert Members.from_bytes(file.getvalue()).to_bytes() == members.to_bytes()
