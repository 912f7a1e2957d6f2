"""Toy data: the same twice, in the public formats, with true answers that a question does not give away."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain import toy
from unimo3.data.blind_baseline import BlindGuesser
from unimo3.data.toy.choices import choice_captions, draw_two, exchanged, sentence
from unimo3.data.toy.language import captions, pair_statement, questions, statement
from unimo3.data.toy.scene import draw_scene
from unimo3.metrics.vqa import vqa_accuracy

NUM_IMAGES = 60
# Official accuracy of the best guess from the text alone, of people who always agree; docs/data.md states it.
MOST_BLIND = {"fine": 0.40, "object": 0.50, "scene": 0.50, "overall": 0.45}


def draw(*arguments) -> int:
    """Run the command in this process; return its exit status."""
    with pytest.raises(SystemExit) as end:
        toy.main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def digests(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "data"
    assert draw(out, "--images", NUM_IMAGES, "--size", 48, "--seed", 3) == 0
    return out


def read(path: Path):
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_seed_gives_the_same_bytes_another_seed_others(root, tmp_path):
    assert draw(tmp_path / "again", "--images", NUM_IMAGES, "--size", 48, "--seed", 3) == 0
    assert digests(tmp_path / "again") == digests(root)
    assert draw(tmp_path / "other", "--images", NUM_IMAGES, "--size", 48, "--seed", 4) == 0
    one, other = digests(root), digests(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one if name.endswith((".jpg", ".png")))


def test_coco_has_karpathys_fields_and_five_captions_an_image(root):
    images = read(root / "coco" / "dataset_coco.json")["images"]
    assert len(images) == len({image["cocoid"] for image in images}) == NUM_IMAGES
    assert {image["split"] for image in images} == {"train", "restval", "val", "test"}
    for image in images:
        assert len(image["sentences"]) == 5
        assert image["sentids"] == [sentence["sentid"] for sentence in image["sentences"]]
        assert all(sentence["raw"].split() == sentence["tokens"] for sentence in image["sentences"])
        with Image.open(root / "coco" / image["filepath"] / image["filename"]) as picture:
            assert (picture.format, picture.size) == ("JPEG", (48, 48))
    assert len(list((root / "coco").rglob("*.jpg"))) == NUM_IMAGES


def test_vqav2_has_ten_answers_a_question_whose_majority_is_right(root):
    split_of = {image["cocoid"]: image["split"] for image in read(root / "coco" / "dataset_coco.json")["images"]}
    seen = Counter()
    for year, splits in (("train2014", {"train"}), ("val2014", {"val", "test"})):
        texts = read(root / "vqav2" / f"v2_OpenEnded_mscoco_{year}_questions.json")["questions"]
        notes = read(root / "vqav2" / f"v2_mscoco_{year}_annotations.json")["annotations"]
        assert [text["question_id"] for text in texts] == [note["question_id"] for note in notes]
        assert {split_of[text["image_id"]] for text in texts} == splits
        for note in notes:
            answers = [answer["answer"] for answer in note["answers"]]
            assert len(answers) == 10
            assert vqa_accuracy(note["multiple_choice_answer"], answers) == 1.0
            seen[note["granularity"]] += 1
    assert set(seen) == {"fine", "object", "scene"}


def test_flickr30k_and_snli_ve_have_the_same_images(root):
    images = {image["filename"] for image in read(root / "flickr30k" / "dataset_flickr30k.json")["images"]}
    assert images == {path.name for path in (root / "flickr30k" / "flickr30k-images").iterdir()}
    lines = (root / "flickr30k" / "pairs.csv").read_text().splitlines()
    assert lines[0] == "image,caption"
    assert len(lines) == 1 + 5 * len(images)
    assert {line.split(",")[0] for line in lines[1:]} == {f"flickr30k-images/{name}" for name in images}
    labels = Counter()
    for split in ("train", "dev", "test"):
        for line in read_lines(root / "snli_ve" / f"snli_ve_{split}.jsonl"):
            assert f"{line['Flickr30K_ID']}.jpg" in images
            labels[line["gold_label"]] += 1
    assert set(labels) == {"entailment", "neutral", "contradiction"}


def test_nlvr2_has_two_pictures_a_sentence(root):
    for split in ("train", "dev", "test1"):
        for line in read_lines(root / "nlvr2" / f"{split}.json"):
            folder = f"images/train/{line['directory']}" if split == "train" else split
            stem = line["identifier"].rpartition("-")[0]
            assert line["label"] in ("True", "False")
            for side in range(2):
                with Image.open(root / "nlvr2" / folder / f"{stem}-img{side}.png") as picture:
                    assert picture.size == (48, 48)


def test_sugarcrepe_and_winoground_have_their_releases_fields_and_images(root):
    folder = root / "sugarcrepe"
    files = sorted(path.stem for path in folder.glob("*.json"))
    assert files == ["add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"]
    for record in read(folder / "swap_att.json").values():
        assert sorted(record["caption"].split()) == sorted(record["negative_caption"].split())
        with Image.open(folder / "val2017" / record["filename"]) as picture:
            assert (picture.format, picture.size) == ("JPEG", (48, 48))
    records = read_lines(root / "winoground" / "examples.jsonl")
    assert [record["id"] for record in records] == list(range(NUM_IMAGES // 16))
    for record in records:
        assert sorted(record["caption_0"].split()) == sorted(record["caption_1"].split())
        assert record["collapsed_tag"] in ("Object", "Relation")
        for side in range(2):
            with Image.open(root / "winoground" / "images" / f"{record[f'image_{side}']}.png") as picture:
                assert picture.size == (48, 48)


def scenes(number):
    for index in range(number):
        rng = np.random.default_rng((7, index))
        yield draw_scene(rng), rng


def true_answer(scene, text: str) -> str:
    """The answer by the picture, from the words of the question alone."""
    words = text.rstrip("?").split()
    named = [thing for thing in scene if thing.name in text]
    if text.startswith("what is the texture of the small"):
        (thing,) = (thing for thing in named if thing.size == "small")
        return thing.texture
    if text.startswith("what color is the small"):
        (thing,) = (thing for thing in scene if thing.size == "small" and thing.shape == words[-1])
        return thing.colour
    if text.startswith("what shape is"):
        (thing,) = (thing for thing in scene if thing.colour == words[-1])
        return thing.shape
    if text.startswith("how many"):
        shape = {"crosses": "cross"}.get(words[2], words[2].rstrip("s"))
        return str(sum(thing.shape == shape for thing in scene))
    if text.startswith("is there a"):
        return "yes" if named else "no"
    if text.startswith("is the"):
        one, other = sorted(named, key=lambda thing: text.index(thing.name))
        relations = {
            "left of": one.x < other.x,
            "right of": one.x > other.x,
            "above": one.y < other.y,
            "below": one.y > other.y,
        }
        return "yes" if next(value for word, value in relations.items() if word in text) else "no"
    position = {
        "left": lambda thing: thing.x,
        "right": lambda thing: -thing.x,
        "top": lambda thing: thing.y,
        "bottom": lambda thing: -thing.y,
    }[words[-1]]
    return min(scene, key=position).colour


def test_every_answer_is_what_the_picture_shows():
    kinds = Counter()
    for scene, rng in scenes(400):
        for question in questions(scene, rng):
            assert question.answer == true_answer(scene, question.text), (question, scene)
            assert question.answer in question.options
            kinds[question.kind, question.granularity] += 1
    assert len(kinds) == 7
    assert min(kinds.values()) > 50


def test_captions_and_statements_are_true_of_the_picture():
    for scene, rng in scenes(200):
        names = {thing.name for thing in scene}
        relation, listing, _, details, leftmost = captions(scene, rng)
        assert sorted(listing.partition(" : ")[2].split(" , ")) == sorted(f"a {name}" for name in names)
        assert sum(name in relation for name in names) >= 2
        assert all(any(name in part for name in names) for part in details.split(" , "))
        assert min(scene, key=lambda thing: thing.x).name in leftmost
        sentence, label = statement(scene, rng)
        assert (label == "contradiction") == (not any(name in sentence for name in names))
        other = draw_scene(rng)
        sentence, truth = pair_statement(scene, other, rng)
        if "in total" in sentence:
            assert truth == (int(sentence.split()[2]) == len(scene) + len(other))
        else:
            side = scene if "left" in sentence else other
            assert truth == any(thing.name in sentence for thing in side)


def is_true(scene, text: str) -> bool:
    """Whether a picture of two objects shows "a NAME RELATION a NAME", with a texture or a third object."""
    words = text.split()
    textures = [word for word in words if word in ("solid", "striped", "dotted")]
    words = [word for word in words if word not in textures]
    one, where, other, third = " ".join(words[1:3]), words[3:-3], " ".join(words[-2:]), ""
    if "and" in words:
        third, words = other, words[: words.index("and")]
        where, other = words[3:-3], " ".join(words[-2:])
    things = {thing.name: thing for thing in scene}
    if one not in things or other not in things or (third and third not in things):
        return False
    if textures and textures != [things[one].texture]:
        return False
    dx, dy = things[one].x - things[other].x, things[one].y - things[other].y
    holds = {"left": dx < 0, "right": dx > 0, "above": dy < 0, "below": dy > 0}
    return holds[where[0]]


def test_of_the_captions_to_choose_from_one_is_true():
    seen = set()
    for number in range(200):
        rng = np.random.default_rng((7, number))
        scene = draw_two(rng)
        caption, negatives = choice_captions(scene, rng)
        assert is_true(scene, caption)
        for category, negative in negatives.items():
            assert not is_true(scene, negative), (category, negative, scene)
            seen.add(category)
        for what in ("Object", "Relation"):
            swapped = exchanged(scene, what)
            assert is_true(swapped, sentence(*swapped))
            assert not is_true(swapped, caption)
            assert not is_true(scene, sentence(*swapped))
    assert len(seen) == 7


def test_a_question_reveals_little_of_its_answer():
    records = [
        {
            "question": question.text,
            "question_type": question.kind,
            "multiple_choice_answer": question.answer,
            "answers": [question.answer] * 10,
            "granularity": question.granularity,
        }
        for scene, rng in scenes(4000)
        for question in questions(scene, rng)
    ]
    half = len(records) // 2
    rates = BlindGuesser(records[:half]).accuracy(records[half:])
    for group, most in MOST_BLIND.items():
        assert rates[group] < most, rates


def test_the_command_prints_the_rate_of_the_data_it_drew(root, tmp_path, capfd):
    assert draw(tmp_path / "again", "--images", NUM_IMAGES, "--size", 48, "--seed", 3) == 0
    printed = capfd.readouterr().out
    for group, rate in toy.blind_rates(root / "vqav2").items():
        assert f"  {group}: {rate:.3f}" in printed


def test_bad_arguments_are_named_all_at_once_and_leave_nothing(root, tmp_path, capfd):
    assert draw(root, "--images", "3", "--size", "8", "--seed", "-1") == 78
    printed = capfd.readouterr().err
    assert "Invalid configuration (4 errors)" in printed
    for start in ("--images 3:", "--size 8:", "--seed -1:", f"out {root}: exists"):
        assert f"  - {start}" in printed
    assert draw(tmp_path / "new", "--images", "3") == 78
    assert list(tmp_path.iterdir()) == []


def test_an_argument_of_the_wrong_kind_is_a_bad_setting(tmp_path, capfd):
    assert draw(tmp_path / "new", "--images", "many") == 78
    printed = capfd.readouterr().err
    assert "usage: python -m pretrain.toy" in printed
    assert "argument --images: invalid int value: 'many'" in printed
