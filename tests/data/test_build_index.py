"""What `index` finds next to the tars: indexes of other programs, compressed tars, files that it must not touch."""

import json
import shutil

import pytest

from benchmarks.scale_data import write_version_3
from tests.data.conftest import convert, write_tar
from unimo3.data.index import ShardIndex
from unimo3.data.shards import index_tar

WIDS = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [{"url": "0.tar", "nsamples": 1}]}


@pytest.fixture
def tars(tmp_path):
    write_tar(tmp_path / "0.tar", {"a": {"jpg": b"", "txt": b"x"}})
    return tmp_path


@pytest.mark.parametrize(
    "content", [json.dumps(WIDS), "[]", "{}", '{"version": 2}', "null", "half {", "[" * 100_000, ""]
)
def test_the_index_of_another_program_is_replaced_only_on_request(tars, content, capfd):
    path = tars / "index.json"
    path.write_text(content)
    assert convert("index", "--src", str(tars)) == 78
    error = capfd.readouterr().err
    assert f"--src {tars}: its index.json was not written by this program, or is damaged; move it away" in error
    assert path.read_text() == content
    assert sorted(entry.name for entry in tars.iterdir()) == ["0.tar", "index.json"]
    assert convert("index", "--src", str(tars), "--overwrite") == 0
    assert ShardIndex(tars).samples_per_shard == [1]


def test_an_index_of_any_earlier_version_is_replaced_without_overwrite(tars):
    assert convert("index", "--src", str(tars)) == 0
    path = tars / "index.json"
    content = json.loads(path.read_text())
    assert convert("index", "--src", str(tars)) == 0
    path.write_text(json.dumps(content | {"version": 1}))
    assert convert("index", "--src", str(tars)) == 0
    assert json.loads(path.read_text()) == content


def test_overwrite_does_not_take_the_index_of_another_program_for_a_split(source, tmp_path, capfd):
    out = tmp_path / "out"
    (out / "thesis").mkdir(parents=True)
    (out / "thesis" / "index.json").write_text(json.dumps(WIDS))
    assert convert("coco", "--src", str(source), "--out", str(out), "--overwrite") == 78
    assert f"--out {out}: contains other things than shards" in capfd.readouterr().err
    assert (out / "thesis" / "index.json").is_file()


@pytest.mark.parametrize(
    "name",
    [
        *("1.tar.gz", "1.tgz", "1.tar.zst", "b.v2.tbz2", "1.TAR", "1.tar.Z", "1.txz", "1.tar.lz", "1.taz", "1.tar.7z"),
        *("1.tar.aa", "1.tar.gz.ab", "1.tar.part", "1.tar.part2", "1.tar.001", "1.tgz.1"),
    ],
)
def test_a_compressed_tar_is_named_and_not_skipped(tars, name, capfd):
    assert convert("index", "--src", str(tars)) == 0
    shutil.copy(tars / "0.tar", tars / name)
    capfd.readouterr()
    assert convert("index", "--src", str(tars)) == 78
    assert (
        f"1 tars are compressed or in parts, or their names do not end in .tar ({name}); decompress"
        in capfd.readouterr().err
    )
    assert convert("index", "--src", str(tars), "--verify") == 78
    assert f"{tars / name}: is not in index.json" in capfd.readouterr().err
    (tars / "0.tar").unlink()
    assert convert("index", "--src", str(tars)) == 78
    assert "decompress" in capfd.readouterr().err


def test_other_files_next_to_the_tars_stay(tars):
    names = ["0.tar.md5", "0.tar.json", "0.tar.idx", "0.tar.sha256", "index.lock", "a.gz", "list.tar.txt"]
    for name in names:
        (tars / name).write_text("of others")
    assert convert("index", "--src", str(tars)) == 0
    assert [(tars / name).read_text() for name in names] == ["of others"] * len(names)
    assert len(list(tars.iterdir())) == len(names) + 4


@pytest.fixture(scope="module")
def lacking(source, tmp_path_factory):
    """A conversion of VQAv2 of whose training images one is missing."""
    root = tmp_path_factory.mktemp("lacking")
    shutil.copytree(source, root / "source")
    (root / "source" / "train2014" / "COCO_train2014_000000000002.jpg").unlink()
    arguments = ("--src", str(root / "source"), "--out", str(root / "out"), "--min-answer-count", "1")
    assert convert("vqav2", *arguments, "--shard-size", "8", "--max-reject-ratio", "0.5") == 0
    return root / "out"


@pytest.mark.parametrize(
    ("state", "has_record", "name"),
    [
        ("as written", True, "val"),
        ("as written", False, "dev"),
        ("version 2", False, "dev"),
        ("version 1", False, "dev"),
        ("version 2", True, "../moved/dev"),
        ("damaged", True, "../moved/dev"),
        ("removed", True, "test"),
        ("no rejects.jsonl", False, "../moved/test"),
        # Of an earlier version, without a record: all that is left is the name.
        ("damaged", False, "train"),
        ("removed", False, "train"),
    ],
)
def test_a_converted_split_that_is_indexed_again_stays_what_it_is(lacking, tmp_path, state, has_record, name):
    out = tmp_path / "out"
    shutil.copytree(lacking, out)
    shutil.rmtree(out / "val")
    folder = out / name
    folder.parent.mkdir(exist_ok=True)
    (out / "train").rename(folder)
    path = folder / "index.json"
    if state.startswith("version"):
        write_version_3(folder)
    content = json.loads(path.read_text())
    assert content["missing_ids"] == [200, 201]
    if not has_record:
        (folder / ".unimo3-shards").unlink()
    if state == "version 2":
        del content["missing_ids"]
    if state.startswith("version"):
        path.write_text(json.dumps(content | {"version": int(state[-1])}))
    if state == "damaged":
        path.write_text("half {")
    if state == "removed":
        path.unlink()
    if state == "no rejects.jsonl":
        (out / "rejects.jsonl").unlink()
    for option in (["--overwrite"], []):
        assert convert("index", "--src", str(folder), *option) == 0
        index = ShardIndex(folder)
        assert (index.split, index.missing_ids) == ("train", [200, 201])
        assert index.dataset == ("out" if name == "train" else "vqav2")


def test_tars_that_are_lost_do_not_leave_an_index_silently(lacking, tmp_path, capfd):
    folder = tmp_path / "train"
    shutil.copytree(lacking / "train", folder)
    (folder / "000001.tar").unlink()
    assert convert("index", "--src", str(folder)) == 78
    assert "1 tar of the index is missing (000001.tar); copy the tars again" in capfd.readouterr().err
    assert len(ShardIndex(folder, check_files=False).shards) == 2
    assert convert("index", "--src", str(folder), "--overwrite") == 0
    assert [shard.name for shard in ShardIndex(folder).shards] == ["000000.tar"]


def test_the_rejects_of_others_are_not_read(tmp_path):
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", {"a": {"jpg": b"", "txt": b"x"}})
    for content in ("no JSON", '{"split": "tars", "key": "a"}'):
        (tmp_path / "rejects.jsonl").write_text(content)
        assert convert("index", "--src", str(tmp_path / "tars")) == 0
        assert ShardIndex(tmp_path / "tars").missing_ids == []


def test_a_tar_that_cannot_be_opened_is_a_data_error(tars, capfd):
    make = {
        "1.tar": lambda path: path.symlink_to("nowhere"),
        "2.tar": lambda path: path.symlink_to("2.tar"),
        "3.tar": lambda path: path.mkdir(),
    }
    for name, method in make.items():
        method(tars / name)
        assert convert("index", "--src", str(tars)) == 78
        error = capfd.readouterr().err
        assert f"DataError: {tars / name}: " in error
        assert "Traceback" not in error
        (tars / name).rmdir() if name == "3.tar" else (tars / name).unlink()
    assert convert("index", "--src", str(tars)) == 0


@pytest.mark.parametrize("name", ["index.json", "index.shards", "index.members", "index.json.tmp", "index.shards.tmp"])
def test_a_folder_where_the_index_is_written_is_named(tars, name, capfd):
    (tars / name).mkdir()
    for option in ([], ["--overwrite"]):
        assert convert("index", "--src", str(tars), *option) == 78
        assert f"--src {tars}: {name} is a folder; move it away" in capfd.readouterr().err
    assert (tars / name).is_dir()


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        "null",
        "half {",
        "[" * 100_000,
        '{"table": []}',
        '{"table": {"num_items": {}}}',
        "\xff",
        '{"digest": 1}',
    ],
)
def test_a_note_of_another_form_is_written_again(tars, content):
    (tars / "0.unimo3-done").write_text(content, encoding="latin-1")
    assert convert("index", "--src", str(tars)) == 0
    assert ShardIndex(tars).samples_per_shard == [1]
    assert not (tars / "0.unimo3-done").exists()


def test_a_note_with_a_field_of_another_form_is_written_again(tars):
    index_tar(tars / "0.tar")
    note = tars / "0.unimo3-done"
    right = json.loads(note.read_text())
    for name in ("name", "num_bytes", "sha256", "num_samples", "num_items"):
        for table in ({key: value for key, value in right["table"].items() if key != name}, {**right["table"], "x": 1}):
            note.write_text(json.dumps(right | {"table": table}))
            assert not index_tar(tars / "0.tar").reused
    for rejects in (None, [1], [{"split": "train"}]):
        note.write_text(json.dumps(right | {"rejects": rejects}))
        assert not index_tar(tars / "0.tar").reused
    assert index_tar(tars / "0.tar").reused
