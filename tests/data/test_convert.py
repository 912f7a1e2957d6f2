"""Converters: nothing lost, nothing invented, nothing half-written, and every bad input named."""

import hashlib
import json
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import convert, draw_jpeg, write_source
from unimo3.data.index import ShardIndex, build_index, index_faults
from unimo3.errors import DataError


def contents(folder: Path) -> list[dict]:
    found = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found += [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
    return found


def test_coco_keeps_every_image_and_caption_in_its_split(source, coco):
    images = json.loads((source / "dataset_coco.json").read_text())["images"]
    for split in ("train", "val", "test"):
        wanted = [i for i in images if i["split"] == split or (split == "train" and i["split"] == "restval")]
        found = contents(coco / split)
        assert Counter(c["image_id"] for c in found) == Counter(i["cocoid"] for i in wanted)
        captions = Counter((c["image_id"], text) for c in found for text in c["captions"])
        assert captions == Counter((i["cocoid"], s["raw"]) for i in wanted for s in i["sentences"])


def test_vqav2_keeps_every_question_and_answer(source, vqav2):
    for split, year in (("train", "train2014"), ("val", "val2014")):
        questions = json.loads((source / f"v2_OpenEnded_mscoco_{year}_questions.json").read_text())["questions"]
        notes = json.loads((source / f"v2_mscoco_{year}_annotations.json").read_text())["annotations"]
        answers = {n["question_id"]: [a["answer"] for a in n["answers"]] for n in notes}
        wanted = Counter(
            (q["image_id"], q["question_id"], q["question"], *answers[q["question_id"]]) for q in questions
        )
        found = Counter(
            (c["image_id"], q["question_id"], q["question"], *q["answers"])
            for c in contents(vqav2 / split)
            for q in c["questions"]
        )
        assert found == wanted
    assert json.loads((vqav2 / "answers.json").read_text()) == {"answers": ["yes", "dog"]} or json.loads(
        (vqav2 / "answers.json").read_text()
    ) == {"answers": ["dog", "yes"]}


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
        found = {}
        for sample in range(shard.num_samples):
            key = index.key(number, sample)
            found |= {f"{key}.{extension}": content for extension, content in index.read(number, sample).items()}
        assert found == wanted


def test_items_are_found_from_their_number(vqav2):
    index = ShardIndex(vqav2 / "train")
    seen = []
    for shard, count in enumerate(index.items_per_shard):
        for item in range(count):
            sample, place = index.item(shard, item)
            seen.append(json.loads(index.read(shard, sample)["json"])["questions"][place]["question_id"])
    assert len(seen) == len(set(seen)) == sum(len(c["questions"]) for c in contents(vqav2 / "train"))


def test_foreign_tars_can_be_indexed(tmp_path):
    with tarfile.open(tmp_path / "part-0.tar", "w") as tar:
        for name in ("x/one.jpg", "x/one.txt", "x/two.jpg"):
            path = tmp_path / "member"
            path.write_bytes(name.encode())
            tar.add(path, arcname=name)
    build_index(tmp_path, "foreign", "train")
    index = ShardIndex(tmp_path)
    assert index.read(0, 0) == {"jpg": b"x/one.jpg", "txt": b"x/one.txt"}
    assert index.read(0, 1) == {"jpg": b"x/two.jpg"}
    assert index.key(0, 1) == "x/two"


def test_a_changed_or_missing_shard_is_named(source, tmp_path):
    out = tmp_path / "coco"
    convert("coco", "--src", str(source), "--out", str(out), "--shard-size", "4")
    shard = out / "train" / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"000001\.tar: has \d+ bytes, its index says"):
        ShardIndex(out / "train")
    shard.unlink()
    with pytest.raises(DataError, match=r"000001\.tar: is missing"):
        ShardIndex(out / "train")
    with pytest.raises(DataError, match=r"index\.json: cannot be read"):
        ShardIndex(tmp_path)


def break_image(root):
    path = next((root / "val2014").iterdir())
    path.write_bytes(path.read_bytes()[:300])
    return path.name


def lose_image(root):
    path = next((root / "train2014").iterdir())
    path.unlink()
    return path.name


def edit(name, change):
    def apply(root):
        content = json.loads((root / name).read_text())
        expected = change(content)
        (root / name).write_text(json.dumps(content))
        return expected

    return apply


def empty_caption(content):
    content["images"][3]["sentences"][1]["raw"] = "  "
    return r"dataset_coco\.json: images\[3\]\.sentences\[1\]: field 'raw' is empty"


def lose_filename(content):
    del content["images"][5]["filename"]
    return r"dataset_coco\.json: images\[5\]: field 'filename' is missing"


def wrong_type(content):
    content["images"][2]["cocoid"] = "three"
    return r"images\[2\]: field 'cocoid' is 'three'; int expected"


def lose_filepath(content):
    del content["images"][1]["filepath"]
    return r"images\[1\]: field 'filepath' is missing"


def leave_the_folder(content):
    content["images"][1]["split"] = "../escaped"
    return r"images\[1\]: field 'split' is '\.\./escaped'; one of train, restval, val, test expected"


def repeat_an_image(content):
    content["images"][1]["cocoid"] = content["images"][0]["cocoid"]
    return r"image id 1 stands in the source twice"


def truncate_json(root):
    path = root / "dataset_coco.json"
    path.write_text(path.read_text()[:-20])
    return r"dataset_coco\.json: is not JSON"


BROKEN_COCO = {
    "an undecodable image": break_image,
    "a missing image": lose_image,
    "an empty caption": edit("dataset_coco.json", empty_caption),
    "a missing field": edit("dataset_coco.json", lose_filename),
    "a field of another type": edit("dataset_coco.json", wrong_type),
    "no folder of an image": edit("dataset_coco.json", lose_filepath),
    "a split outside the output": edit("dataset_coco.json", leave_the_folder),
    "an image twice": edit("dataset_coco.json", repeat_an_image),
    "half a JSON": truncate_json,
}


@pytest.mark.parametrize("what", BROKEN_COCO)
def test_bad_coco_input_is_named_and_leaves_nothing(what, tmp_path, capfd):
    root = write_source(tmp_path / "source", num_images=12)
    expected = BROKEN_COCO[what](root)
    assert convert("coco", "--src", str(root), "--out", str(tmp_path / "out")) == 78
    error = capfd.readouterr().err
    assert error.startswith("DataError: ")
    assert re.search(expected, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def lose_annotation(content):
    lost = content["annotations"].pop()
    return rf"question_id {lost['question_id']} has no annotation"


def lose_answers(content):
    del content["annotations"][1]["answers"]
    return r"annotations\[1\]: field 'answers' is missing"


def empty_answers(content):
    content["annotations"][1]["answers"] = []
    return r"annotations\[1\]: field 'answers' is empty"


def another_image(content):
    content["annotations"][1]["image_id"] += 1
    return r"annotations\[1\]: field 'image_id' is \d+, .*questions\.json has \d+ for question_id"


@pytest.mark.parametrize("change", [lose_annotation, lose_answers, empty_answers, another_image])
def test_bad_vqav2_input_is_named_and_leaves_nothing(change, tmp_path, capfd):
    root = write_source(tmp_path / "source", num_images=12)
    expected = edit("v2_mscoco_train2014_annotations.json", change)(root)
    assert convert("vqav2", "--src", str(root), "--out", str(tmp_path / "out")) == 78
    assert re.search(expected, capfd.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_all_faults_of_the_command_line_are_named_at_once(source, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    arguments = ("--src", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), "--shard-size", "0")
    assert convert("vqav2", *arguments, "--tokenizer-vocab", "400") == 78
    error = capfd.readouterr().err
    assert error.startswith("ConfigError: 4 settings to mend")
    for flag in ("--src", "--out", "--shard-size", "--tokenizer-vocab"):
        assert f"- {flag} " in error


def test_overwrite_replaces_a_finished_folder(source, tmp_path):
    out = tmp_path / "out"
    assert convert("coco", "--src", str(source), "--out", str(out), "--shard-size", "4") == 0
    assert convert("coco", "--src", str(source), "--out", str(out)) == 78
    assert convert("coco", "--src", str(source), "--out", str(out), "--shard-size", "100", "--overwrite") == 0
    assert ShardIndex(out / "train").samples_per_shard == [np.sum([i % 6 < 4 for i in range(23)])]


def test_overwrite_refuses_a_folder_that_holds_anything_else(source, tmp_path, capfd):
    out = tmp_path / "out"
    assert convert("coco", "--src", str(source), "--out", str(out), "--shard-size", "4") == 0
    (out / "thesis").mkdir()
    assert convert("coco", "--src", str(source), "--out", str(out), "--overwrite") == 78
    assert f"--out {out}: holds other things than shards" in capfd.readouterr().err
    assert (out / "thesis").is_dir()


def lose_members(folder):
    (folder / "index.npz").unlink()
    return r"index\.npz: is missing or not the one index\.json was written with"


def cut_members(folder):
    path = folder / "index.npz"
    path.write_bytes(path.read_bytes()[:-30])
    return r"index\.npz: is missing or not the one"


def lose_field(folder):
    path = folder / "index.json"
    path.write_text(path.read_text().replace('"dataset"', '"data"'))
    return r"index\.json: field 'dataset' is missing"


def list_instead(folder):
    (folder / "index.json").write_text("[]")
    return r"index\.json: version None"


@pytest.mark.parametrize("damage", [lose_members, cut_members, lose_field, list_instead])
def test_a_damaged_index_is_named(coco, tmp_path, damage):
    folder = tmp_path / "train"
    shutil.copytree(coco / "train", folder)
    expected = damage(folder)
    with pytest.raises(DataError, match=expected):
        ShardIndex(folder)
    (fault,) = index_faults("data.train", str(folder), "captions")
    assert fault.startswith(f"data.train: '{folder}': ")


def test_shards_of_another_kind_are_refused(coco, vqav2):
    assert index_faults("data.train", str(coco / "train"), "captions") == []
    (fault,) = index_faults("data.train", str(coco / "train"), "questions")
    assert "its samples have no questions (coco, train)" in fault
    (fault,) = index_faults("data.val", str(vqav2 / "val"), "captions")
    assert "its samples have no captions (vqav2, val)" in fault
