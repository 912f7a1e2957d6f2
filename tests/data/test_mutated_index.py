"""Any index.json and index.shards are read as they are, or refused with one message."""

import contextlib
import hashlib
import io
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scale_data import write_version_3
from tests.data.conftest import convert, draw_jpeg, write_tar
from tests.data.mutations import damaged, mutated, property_settings, result_of
from unimo3.data.args import DataArgs
from unimo3.data.index import ShardIndex
from unimo3.errors import DataError

QUESTIONS = b'{"questions": [{"question_id": 1, "question": "?", "answers": ["yes"]}], "captions": ["a", "b"]}'


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for number in range(2):
        sample = {"jpg": draw_jpeg(number, 8, 8), "json": QUESTIONS}
        write_tar(folder / f"{number}.tar", {"a": sample, "b": sample})
    assert convert("index", "--src", str(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def older(written, tmp_path_factory):
    folder = tmp_path_factory.mktemp("older") / "version_3"
    shutil.copytree(written, folder)
    write_version_3(folder)
    return folder


def read_all(folder):
    """Read all that the index lists; at most a DataError is raised."""
    index = ShardIndex(folder)
    with contextlib.closing(index):
        assert [isinstance(identity, int | str) for identity in index.missing_ids] == [True] * len(index.missing_ids)
        for shard, num_samples in enumerate(index.samples_per_shard):
            for sample in range(num_samples):
                index.read(shard, sample)
                index.key(shard, sample)
            for kind in ("captions", "questions"):
                for item in range(index.items_per_shard(kind)[shard]):
                    index.item(kind, shard, item)


def replaced(folder, shards):
    """Write another index.shards; the fields of index.json that make it the right one."""
    (folder / "index.shards").write_bytes(shards)
    return {"shards_bytes": len(shards), "shards_sha256": hashlib.sha256(shards).hexdigest()}


def check(folder, content):
    (folder / "index.json").write_text(content)
    with contextlib.suppress(DataError):
        read_all(folder)
    for kind in ("captions", "questions", "statement"):
        errors = DataArgs(train=str(folder), val=str(folder)).shard_errors(kind)
        assert all(str(folder) in error for error in errors)
    result_of("index", "--src", str(folder), "--verify")


@property_settings
@given(data=st.data())
def test_any_index_is_read_or_refused(tmp_path_factory, written, older, data):
    folder = tmp_path_factory.getbasetemp() / "mutated_index"
    shutil.rmtree(folder, ignore_errors=True)
    is_older = data.draw(st.booleans())
    shutil.copytree(older if is_older else written, folder)
    content = json.loads((folder / "index.json").read_text())
    if is_older:
        content["shards"][0]["num_samples"] = data.draw(st.sampled_from([2, 2, 2, 600, 2**52]))
    elif data.draw(st.booleans()):
        check(
            folder, json.dumps(content | replaced(folder, data.draw(damaged((folder / "index.shards").read_bytes()))))
        )
        return
    for _ in range(data.draw(st.integers(1, 2))):
        content = data.draw(mutated(content))
    check(folder, json.dumps(content))


FIELDS = [
    *[("shards", 0, name) for name in ("name", "bytes", "sha256", "num_samples", "num_items", "table")],
    *[("shards", 1, "table", number) for number in range(3)],
    ("shards", 0, "num_items", "questions"),
    *[(name,) for name in ("dataset", "split", "members_sha256", "missing_ids", "shards", "version")],
    *[(name,) for name in ("shards_bytes", "shards_sha256")],
]


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: "-".join(map(str, path)))
def test_a_field_of_another_form_is_a_data_error(written, older, tmp_path, path):
    folder = tmp_path / "copy"
    shutil.copytree(written if path[0].startswith("shards_") else older, folder)
    text = (folder / "index.json").read_text()
    others: list = [None, -1, 1.5, True, 2**63, 10**400, "x", "../0.tar", "a\0b", "\ud83d", [], {}, [1], [None]]
    for value in others:
        content = json.loads(text)
        at = content
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value
        is_right = path in (("dataset",), ("split",)) and isinstance(value, str)
        (folder / "index.json").write_text(json.dumps(content))
        if is_right or (path == ("missing_ids",) and value in ([], [1], None)):
            read_all(folder)
            continue
        with pytest.raises(DataError, match=r"index\.json: |is missing|has \d+ bytes|index\.(members|shards): "):
            read_all(folder)
        errors = DataArgs(train=str(folder)).shard_errors("captions")
        assert len(errors) <= 1


@pytest.mark.parametrize("content", ["[" * 100_000, '{"version": 3, "shards": ' + "[" * 100_000, "", "null", "\x00"])
def test_an_index_that_is_no_json_object_is_a_data_error(written, tmp_path, content):
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    check(folder, content)
    with pytest.raises(DataError):
        read_all(folder)


@pytest.mark.parametrize("name", ["num_samples", "num_items"])
def test_counts_that_are_not_those_of_the_table_are_a_data_error(older, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(older, folder)
    for value in (1, 3) if name == "num_samples" else ({"captions": 4, "questions": 3, "hypotheses": 0},):
        content = json.loads((folder / "index.json").read_text())
        content["shards"][1][name] = value
        (folder / "index.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"index\.json: the counts of 1\.tar are not those of its table"):
            read_all(folder)


CHANGED_SHARDS = {
    "parent": (
        lambda records: records["name"].__setitem__(1, b".."),
        r"index\.shards: is no list of shards \(a name is not that",
    ),
    "folder": (lambda records: records["name"].__setitem__(1, b"../1.tar"), r"a name is not that of a file"),
    "no name": (lambda records: records["name"].__setitem__(1, b""), r"a name is not that of a file"),
    "zero in a name": (lambda records: records["name"].__setitem__(1, b"1\0.tar"), r"a name is not that of a file"),
    "negative": (lambda records: records["table_bytes"].__setitem__(0, -1), "a table_bytes is below 0 or above"),
    "huge": (lambda records: records["num_items"].__setitem__((0, 1), 2**62), "a num_items is below 0 or above"),
    "samples": (lambda records: records["num_samples"].__setitem__(1, 3), r"the counts of 1\.tar are not those of"),
    "size": (lambda records: records["num_bytes"].__setitem__(1, 9), r"1\.tar: has 10240 bytes, its index has 9"),
    "table": (lambda records: records["table_offset"].__setitem__(1, 7), r"index\.members: is not the one"),
    "two axes": (lambda records: records.resize((1, 2)), r"index\.shards: is no list of shards \(its records are"),
}


@pytest.mark.parametrize("change", CHANGED_SHARDS)
def test_shards_that_no_writer_lists_are_a_data_error(written, tmp_path, change):
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    apply, expected = CHANGED_SHARDS[change]
    records = np.load(folder / "index.shards")
    apply(records)
    file = io.BytesIO()
    np.save(file, records)
    content = json.loads((folder / "index.json").read_text()) | replaced(folder, file.getvalue())
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=expected):
        read_all(folder)


def test_indexes_of_all_versions_have_the_same_shards(written, older):
    new, old = ShardIndex(written), ShardIndex(older)
    assert list(new.shards) == list(old.shards)
    assert (new.fingerprint, new.num_samples) == (old.fingerprint, old.num_samples) == (old.fingerprint, 4)
    expected = hashlib.sha256("".join(shard.sha256 for shard in old.shards).encode()).hexdigest()
    assert new.fingerprint == expected  # recorded in checkpoints since version 2
    assert sorted(path.name for path in written.iterdir())[2:] == ["index.json", "index.members", "index.shards"]
