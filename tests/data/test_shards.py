"""Converters: nothing lost, nothing invented, nothing half-written, and every bad input named."""

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from finetune.vqa import VqaConfig
from tests.data.conftest import convert, draw_jpeg, write_source, write_tar
from unimo3.data import index as index_module
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.args import DataArgs
from unimo3.data.conversion import Conversion, _check_rejects
from unimo3.data.formats import vqav2
from unimo3.data.index import ShardIndex
from unimo3.data.progress import PreparationProgress
from unimo3.data.shards import Reject, ShardDone
from unimo3.data.stored_images import ImageOptions, UnusableImageError, read_image
from unimo3.errors import DataError
from unimo3.images import decode


def contents(folder: Path) -> list[dict]:
    records = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            records += [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
    return records


def test_coco_shards_have_every_image_and_caption_of_the_split(source, coco):
    images = json.loads((source / "dataset_coco.json").read_text())["images"]
    for split in ("train", "val", "test"):
        wanted = [i for i in images if i["split"] == split or (split == "train" and i["split"] == "restval")]
        records = contents(coco / split)
        assert Counter(c["image_id"] for c in records) == Counter(i["cocoid"] for i in wanted)
        captions = Counter((c["image_id"], text) for c in records for text in c["captions"])
        assert captions == Counter({(i["cocoid"], s["raw"]) for i in wanted for s in i["sentences"]})


def test_vqav2_shards_have_every_question_and_answer(source, vqav2):
    for split, year in (("train", "train2014"), ("val", "val2014")):
        questions = json.loads((source / f"v2_OpenEnded_mscoco_{year}_questions.json").read_text())["questions"]
        notes = json.loads((source / f"v2_mscoco_{year}_annotations.json").read_text())["annotations"]
        answers = {n["question_id"]: [a["answer"] for a in n["answers"]] for n in notes}
        wanted = Counter(
            (q["image_id"], q["question_id"], q["question"], *answers[q["question_id"]]) for q in questions
        )
        actual = Counter(
            (c["image_id"], q["question_id"], q["question"], *q["answers"])
            for c in contents(vqav2 / split)
            for q in c["questions"]
        )
        assert actual == wanted
    assert sorted(AnswerVocabulary.load(vqav2 / "answers.json").answers) == ["dog", "yes"]


def test_images_are_stored_as_they_are(source, coco):
    index = ShardIndex(coco / "train")
    for shard, size in enumerate(index.samples_per_shard):
        for sample in range(size):
            members = index.read(shard, sample)
            number = json.loads(members["json"])["image_id"] - 1
            assert members["jpg"] == draw_jpeg(number)


def test_the_same_source_gives_the_same_bytes(source, coco, tmp_path):
    again = tmp_path / "again"
    convert("coco", "--src", str(source), "--out", str(again), "--shard-size", "4", "--tokenizer-vocab", "300")

    def digests(root):
        files = (path for path in sorted(root.rglob("*")) if path.is_file())
        return {path.relative_to(root): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert digests(again) == digests(coco)


def test_offsets_read_what_tarfile_reads(coco):
    index = ShardIndex(coco / "train")
    for number, shard in enumerate(index.shards):
        with tarfile.open(coco / "train" / shard.name) as tar:
            wanted = {m.name: tar.extractfile(m).read() for m in tar}
        actual = {}
        for sample in range(shard.num_samples):
            key = index.key(number, sample)
            actual |= {f"{key}.{extension}": content for extension, content in index.read(number, sample).items()}
        assert actual == wanted


def test_items_are_located_by_their_index(vqav2):
    index = ShardIndex(vqav2 / "train")
    seen = []
    for shard, count in enumerate(index.items_per_shard("questions")):
        for item in range(count):
            sample, number = index.item("questions", shard, item)
            seen.append(json.loads(index.read(shard, sample)["json"])["questions"][number]["question_id"])
    assert len(seen) == len(set(seen)) == sum(len(c["questions"]) for c in contents(vqav2 / "train"))


def test_foreign_tars_can_be_indexed(tmp_path):
    with tarfile.open(tmp_path / "part-0.tar", "w") as tar:
        for name in ("x/one.jpg", "x/one.txt", "x/two.jpg"):
            path = tmp_path / "member"
            path.write_bytes(name.encode())
            tar.add(path, arcname=name)
    (tmp_path / "member").unlink()
    assert convert("index", "--src", str(tmp_path)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.json",
        "index.members",
        "index.shards",
        "part-0.tar",
    ]
    index = ShardIndex(tmp_path)
    assert index.read(0, 0) == {"jpg": b"x/one.jpg", "txt": b"x/one.txt"}
    assert index.read(0, 1) == {"jpg": b"x/two.jpg"}
    assert index.key(0, 1) == "x/two"


def test_indexing_does_not_change_other_files(tmp_path):
    write_tar(tmp_path / "0.tar", {"one": {"jpg": b"", "txt": b"one"}})
    for name in ("0.done", "0.table", "0.json"):
        (tmp_path / name).write_text("of a downloader")
    assert convert("index", "--src", str(tmp_path)) == 0
    assert all((tmp_path / name).read_text() == "of a downloader" for name in ("0.done", "0.table", "0.json"))
    assert len(list(tmp_path.iterdir())) == 7


def test_a_changed_or_missing_shard_is_named(source, tmp_path):
    out = tmp_path / "coco"
    convert("coco", "--src", str(source), "--out", str(out), "--shard-size", "4")
    shard = out / "train" / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"000001\.tar: has \d+ bytes, its index has"):
        ShardIndex(out / "train")
    shard.unlink()
    with pytest.raises(DataError, match=r"000001\.tar: is missing"):
        ShardIndex(out / "train")
    with pytest.raises(DataError, match=r"index\.json: cannot be read"):
        ShardIndex(tmp_path)


def test_a_bad_record_is_named_and_leaves_nothing(tmp_path, capfd):
    root = write_source(tmp_path / "source", num_images=12)
    path = root / "dataset_coco.json"
    content = json.loads(path.read_text())
    content["images"][1]["cocoid"] = content["images"][0]["cocoid"]
    path.write_text(json.dumps(content))
    assert convert("coco", "--src", str(root), "--out", str(tmp_path / "out")) == 78
    error = capfd.readouterr().err
    assert error.startswith("DataError: ")
    assert "'000000000001' occurs twice in the source's split train; remove one record" in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_image_of_two_splits_is_refused(tmp_path, split, capfd):
    root = write_source(tmp_path / "source", num_images=12)
    path = root / "dataset_coco.json"
    content = json.loads(path.read_text())
    content["images"].append(content["images"][0] | {"split": split})
    path.write_text(json.dumps(content))
    assert convert("coco", "--src", str(root), "--out", str(tmp_path / "out")) == 78
    assert f"000000000001.jpg: is in the source's splits train and {split}; held-out" in capfd.readouterr().err


def test_all_errors_of_the_command_line_are_named_at_once(source, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    arguments = ("--src", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), "--shard-size", "0")
    assert convert("vqav2", *arguments, "--tokenizer-vocab", "400") == 78
    error = capfd.readouterr().err
    assert error.startswith("ConfigError: Invalid configuration (4 errors)")
    for flag in ("--src", "--out", "--shard-size", "--tokenizer-vocab"):
        assert f"- {flag} " in error


def test_overwrite_replaces_a_finished_folder(source, tmp_path):
    out = tmp_path / "out"
    assert convert("coco", "--src", str(source), "--out", str(out), "--shard-size", "4") == 0
    assert convert("coco", "--src", str(source), "--out", str(out)) == 78
    assert convert("coco", "--src", str(source), "--out", str(out), "--shard-size", "100", "--overwrite") == 0
    assert ShardIndex(out / "train").samples_per_shard == [np.sum([i % 6 < 4 for i in range(23)])]


def test_overwrite_continues_where_a_kill_left_half_of_what_it_replaced(source, tmp_path):
    out, replaced = tmp_path / "out", tmp_path / "out.replaced"
    assert convert("coco", "--src", str(source), "--out", str(out), "--shard-size", "4") == 0
    complete = {path.name: path.read_bytes() for path in (out / "train").iterdir()}
    # Killed while the old folder was removed, and before the new one got its name.
    shutil.copytree(out, replaced)
    (replaced / "train" / "index.json").unlink()
    out.rename(tmp_path / "out.partial")
    assert convert("coco", "--src", str(source), "--out", str(out), "--shard-size", "4", "--overwrite") == 0
    assert {path.name: path.read_bytes() for path in (out / "train").iterdir()} == complete
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_refuses_a_folder_that_contains_other_files(source, tmp_path, capfd):
    out = tmp_path / "out"
    assert convert("coco", "--src", str(source), "--out", str(out), "--shard-size", "4") == 0
    (out / "thesis").mkdir()
    assert convert("coco", "--src", str(source), "--out", str(out), "--overwrite") == 78
    assert f"--out {out}: contains other things than shards" in capfd.readouterr().err
    assert (out / "thesis").is_dir()


def lose_members(folder):
    (folder / "index.members").unlink()
    return r"index\.members: is missing"


def cut_members(folder):
    path = folder / "index.members"
    path.write_bytes(path.read_bytes()[:-30])
    return r"index\.members: has \d+ bytes, its index has"


def change_members(folder):
    path = folder / "index.members"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    return r"index\.members: is not the one index\.json was written with \(table of 000000\.tar\)"


def lose_shards(folder):
    (folder / "index.shards").unlink()
    return r"index\.shards: No such file or directory; copy the folder again"


def cut_shards(folder):
    path = folder / "index.shards"
    path.write_bytes(path.read_bytes()[:-30])
    return r"index\.shards: has \d+ bytes, its index has"


def change_shards(folder):
    path = folder / "index.shards"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    return r"index\.shards: is not the one index\.json was written with; copy the folder again"


def lose_field(folder):
    path = folder / "index.json"
    path.write_text(path.read_text().replace('"dataset"', '"data"'))
    return r"index\.json: field 'dataset' is missing"


def list_instead(folder):
    (folder / "index.json").write_text("[]")
    return r"index\.json: version 1, this program reads 2, 3, 4"


@pytest.mark.parametrize(
    "damage",
    [*(lose_members, cut_members, change_members), *(lose_shards, cut_shards, change_shards), lose_field, list_instead],
)
def test_a_damaged_index_is_named(coco, tmp_path, damage):
    folder = tmp_path / "train"
    shutil.copytree(coco / "train", folder)
    expected = damage(folder)
    with pytest.raises(DataError, match=expected):
        ShardIndex(folder).read(0, 0)
    (problem,) = DataArgs(train=str(folder)).shard_errors("captions")
    assert problem.startswith("data.train: ")
    assert re.search(expected, problem)


def test_shards_that_are_not_looked_at_first_are_checked_when_read(coco, tmp_path, monkeypatch):
    folder = tmp_path / "train"
    shutil.copytree(coco / "train", folder)
    assert index_module.checked_shards(4) == [0, 1, 2, 3]
    monkeypatch.setattr(index_module, "_NUM_CHECKED", 3)
    assert index_module.checked_shards(4) == [0, 1, 3]
    with (folder / "000002.tar").open("ab") as file:
        file.write(bytes(512))
    index = ShardIndex(folder)
    assert index.read(1, 0)
    with pytest.raises(DataError, match=r"000002\.tar: is not the tar that was indexed: has \d+ bytes, its index has"):
        index.read(2, 0)
    (folder / "000002.tar").unlink()
    with pytest.raises(DataError, match=r"000002\.tar: cannot be read \(No such file"):
        index.read(2, 0)
    (folder / "000003.tar").unlink()
    with pytest.raises(DataError, match=r"000003\.tar: is missing; copy the folder again"):
        ShardIndex(folder)


def test_shards_of_another_kind_are_refused(coco, vqav2):
    data = DataArgs(train=str(coco / "train"), val=str(vqav2 / "val"))
    (problem,) = data.shard_errors("captions")
    assert problem.startswith("data.val: ")
    assert "its samples have no captions (vqav2, val)" in problem
    (problem,) = data.shard_errors("questions")
    assert "its samples have no questions (coco, train)" in problem


@pytest.mark.parametrize("train", [{"a/train": 1, "b/train": 1}, {"https://example.org/vqav2/train": 1}])
def test_the_answer_vocabulary_must_be_named_where_no_folder_has_it(train):
    # Without room for copies nothing is fetched.
    settings = VqaConfig(init="exported", data=DataArgs(train=train, cache_gb=0.0))
    (problem,) = settings.answers_errors()
    assert problem.startswith("answers: ''")


def test_other_folders_next_to_the_new_one_stay(source, tmp_path, capfd):
    out = tmp_path / "new"
    for name in ("new.partial", "new.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    assert convert("coco", "--src", str(source), "--out", str(out)) == 78
    error = capfd.readouterr().err
    for name in ("new.partial", "new.replaced"):
        assert f"{tmp_path / name} is in the way" in error
        assert (tmp_path / name / "thesis.txt").read_text() == "mine"


def test_the_position_of_bad_images_in_the_source_does_not_matter(tmp_path):
    root = write_source(tmp_path / "source", num_images=300)
    images = json.loads((root / "dataset_coco.json").read_text())["images"]
    of_train = [image for image in images if image["split"] in ("train", "restval")]
    for image in of_train[:120]:
        (root / image["filepath"] / image["filename"]).unlink()
    ratio = str(121 / len(of_train))
    assert convert("coco", "--src", str(root), "--out", str(tmp_path / "out"), "--max-reject-ratio", ratio) == 0


@pytest.mark.parametrize(
    ("split", "ratio", "is_refused"),
    [
        ("test", None, True),
        ("test-dev", None, True),
        ("val", None, False),
        ("train", None, False),
        ("test", 0.001, False),
        ("train", 0.0, True),
    ],
)
def test_a_test_split_loses_no_record_unless_allowed(tmp_path, split, ratio, is_refused):
    progress = PreparationProgress("records")
    reject = Reject(split, "7", "7.jpg", "cannot be decoded", (70, 71))
    progress.add(ShardDone(split, 0, 3000, (reject,), reused=False))
    wanted = Conversion("vqav2", vqav2.convert, tmp_path, tmp_path, tmp_path, False, 1024, ImageOptions(), ratio, 0, 9)
    if is_refused:
        with pytest.raises(DataError, match=f"--max-reject-ratio 0: 1 of 3000 records of {split} cannot be used"):
            _check_rejects(wanted, progress, tmp_path)
        assert json.loads((tmp_path / "rejects.jsonl").read_text())["ids"] == [70, 71]
    else:
        _check_rejects(wanted, progress, tmp_path)


def test_a_damaged_copy_does_not_become_right_by_being_indexed_again(coco, tmp_path, capfd):
    folder = tmp_path / "train"
    shutil.copytree(coco / "train", folder)
    assert convert("index", "--src", str(folder)) == 0
    shard = folder / "000001.tar"
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)
    assert convert("index", "--src", str(folder)) == 78
    assert "1 tar differs from the index (000001.tar)" in capfd.readouterr().err
    assert convert("index", "--src", str(folder), "--overwrite") == 0


def test_members_that_webdataset_ignores_are_no_samples(tmp_path):
    names = ["._a.jpg", "__info__.json", "README", "a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg", "a.txt"]
    names += ["__MACOSX/._a.jpg", "__meta__/c.jpg"]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(str(number).encode()))
    assert convert("index", "--src", str(tmp_path)) == 0
    index = ShardIndex(tmp_path)
    assert [index.key(0, sample) for sample in range(3)] == ["a", "b", "a"]
    assert [index.read(0, sample) for sample in range(3)] == [
        {"jpg": b"3", "txt": b"4"},
        {"jpg": b"5", "txt": b"6"},
        {"jpg": b"7", "txt": b"8"},
    ]
    assert index.samples_per_shard == [3]


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "GIF"])
@pytest.mark.parametrize("size", [(65501, 1), (1, 65501)])
def test_an_image_too_large_for_jpeg_rejects_the_record(tmp_path, kind, size):
    path = tmp_path / "image"
    Image.new("RGB", size).save(path, kind)
    with pytest.raises(UnusableImageError, match=rf"its {size[0]} x {size[1]} pixels cannot be encoded as JPEG"):
        read_image(path, ImageOptions())
    assert max(decode(read_image(path, ImageOptions(max_side=64))[1]).size) == 64


@pytest.mark.parametrize("length", [5, 70_000])
def test_comments_of_other_formats_are_not_stored(tmp_path, length):
    image, text = Image.new("RGB", (32, 16), (200, 0, 0)), PngInfo()
    text.add_text("comment", "x" * length)
    image.save(tmp_path / "image.png", pnginfo=text)
    image.save(tmp_path / "image.gif", comment=b"x" * length)
    image.save(tmp_path / "plain.png")
    plain = read_image(tmp_path / "plain.png", ImageOptions(max_side=8))
    for name in ("image.png", "image.gif"):
        assert read_image(tmp_path / name, ImageOptions(max_side=8)) == plain
    assert b"xxx" not in read_image(tmp_path / "image.gif", ImageOptions())[1]


@pytest.mark.parametrize("key", ["__dQw4w9WgXcQ", "clips/__x", "__x_", "a__b__", "__a/x"])
def test_a_key_with_two_underscores_is_one_of_a_sample(tmp_path, key):
    write_tar(tmp_path / "0.tar", {"a": {"jpg": b"1", "txt": b"one"}, key: {"jpg": b"2", "txt": b"two"}})
    assert convert("index", "--src", str(tmp_path)) == 0
    index = ShardIndex(tmp_path)
    assert [index.key(0, sample) for sample in range(2)] == ["a", key]
    assert index.read(0, 1) == {"jpg": b"2", "txt": b"two"}
