"""Any source is converted with all of its records, or refused with one message."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import draw_jpeg, write_source
from tests.data.mutations import damaged, mutated, property_settings, result_of
from unimo3.data.formats import CONVERTERS
from unimo3.data.formats.sugarcrepe import CATEGORIES
from unimo3.data.index import ShardIndex

FIELD_LINES = (
    "Train_GCC-training.tsv",
    "Validation_GCC-1.1.0-Validation.tsv",
    "train_image_exist.txt",
    "val_image_exist.txt",
)
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")


def flickr_image(number: int, split: str) -> dict[str, Any]:
    return {"filename": f"{number}.jpg", "split": split, "sentences": [{"raw": f"picture {number}"}, {"raw": "a dog"}]}


def region(image: int, phrase: str) -> dict[str, Any]:
    return {"image_id": image, "phrase": phrase, "x": 0, "y": 1, "width": 2, "height": 3}


def hypothesis_of(number: int, label: str) -> dict[str, Any]:
    return {"Flickr30K_ID": str(number), "gold_label": label, "sentence2": "a dog", "pairID": f"{number}.jpg#0r1"}


SNLI = [hypothesis_of(1, "neutral"), hypothesis_of(2, "-"), hypothesis_of(1, "entailment")]
# The values of each source's files; those of JSON lines are lists of records, others complete texts.
FILES: dict[str, dict[str, Any]] = {
    "pairs": {"0.txt": "a dog\nein Fuchs\n", "1.txt": "déjà"},
    "sbu": {"annot.json": [["1.jpg", "a dog"], ["2.jpg", " "], ["3.jpg", "déjà"]]},
    "cc3m": {
        **dict.fromkeys(FIELD_LINES[:2], "a dog\thttp://a/1\nein Fuchs\thttp://a/2\n"),
        **{f"{split}_image_exist.txt": f"x/{split}_image/0.jpg\nx/{split}_image/1.jpg\n" for split in ("train", "val")},
    },
    "vg": {"region_descriptions.json": [{"regions": [region(n, "a dog"), region(n, f"no {n}")]} for n in (1, 2)]},
    "flickr30k": {"dataset_flickr30k.json": {"images": [flickr_image(1, "train"), flickr_image(2, "val")]}},
    "snli_ve": {f"snli_ve_{split}.jsonl": SNLI for split in ("train", "dev", "test")},
    "nlvr2": {
        f"{split}.json": [
            {"identifier": f"{split}-{n}-0-{m}", "sentence": "a dog", "label": "True"} for n in (1, 2) for m in (0, 1)
        ]
        for split in ("train", "dev", "test1")
    },
    "sugarcrepe": {
        f"{category}.json": {"0": {"filename": "1.jpg", "caption": "a dog", "negative_caption": "a cat"}}
        for category in CATEGORIES
    },
    "winoground": {
        "examples.jsonl": [
            {
                "id": n,
                "collapsed_tag": "Both",
                **{f"{kind}_{m}": str(m) for kind in ("image", "caption") for m in (0, 1)},
            }
            for n in (0, 1)
        ]
    },
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A folder for each format."""
    root = tmp_path_factory.mktemp("sources")
    for name, files in FILES.items():
        (root / name).mkdir()
        for file, content in files.items():
            (root / name / file).write_text(text_of(file, content, name))
    picture = draw_jpeg(0, 8, 8)
    folders = ("pairs", "sbu", "cc3m/train_image", "cc3m/val_image", "vg/VG_100K", "flickr30k", "snli_ve", "sugarcrepe")
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(4):
            (root / folder / f"{number}.jpg").write_bytes(picture)
    for folder, split in (("images/train", "train"), ("dev", "dev"), ("test1", "test1")):
        (root / "nlvr2" / folder).mkdir(parents=True)
        for number in range(4):
            (root / "nlvr2" / folder / f"{split}-{number // 2 + 1}-0-img{number % 2}.png").write_bytes(picture)
    for number in range(2):
        (root / "winoground" / f"{number}.png").write_bytes(picture)
    for name in ("coco", "vqav2"):
        write_source(root / name, num_images=6)
        for path in (root / name).glob("*.json"):
            FILES.setdefault(name, {})[path.name] = json.loads(path.read_text())
    return root


def text_of(file: str, content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    if name in ("snli_ve", "nlvr2", "winoground") and isinstance(content, list):
        return "".join(json.dumps(record) + "\n" for record in content)
    return json.dumps(content)


def change_a_file(data: st.DataObject, folder: Path, name: str) -> None:
    """Change the content or the encoding of a file of annotations, or an image."""
    file = data.draw(st.sampled_from(sorted([*FILES[name], "image"])))
    if file == "image":
        path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*.[jp][pn]g"))))
        content = data.draw(st.one_of(st.none(), damaged(path.read_bytes())))
        path.unlink()
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)
        return
    content = FILES[name][file]
    text = text_of(file, content if isinstance(content, str) else data.draw(mutated(content)), name)
    encoded = text.encode(data.draw(st.sampled_from(ENCODINGS)), "replace")
    (folder / file).write_bytes(encoded if data.draw(st.integers(0, 3)) else data.draw(damaged(encoded)))


@pytest.mark.parametrize("name", sorted(CONVERTERS))
@settings(property_settings, max_examples=8)
@given(data=st.data())
def test_a_changed_source_is_converted_completely_or_refused(tmp_path_factory, sources, name, data):
    base = tmp_path_factory.getbasetemp() / f"mutated_{name}"
    shutil.rmtree(base, ignore_errors=True)
    folder, out = shutil.copytree(sources / name, base / "source"), base / "out"
    change_a_file(data, folder, name)
    options = ["--max-reject-ratio", "0.9", "--min-answer-count", "1"]
    options += ["--tokenizer-vocab", "300"] if name == "coco" else []
    status, error = result_of(name, "--src", str(folder), "--out", str(out), *options)
    if status:
        assert str(base) in error or "--min-answer-count" in error
        return
    wanted = Counter((split, sample.key) for split, sample in CONVERTERS[name](folder, folder))
    rejected = []
    if (out / "rejects.jsonl").is_file():
        rejected = [json.loads(line) for line in (out / "rejects.jsonl").read_text("utf-8").splitlines()]
    done = Counter((reject["split"], reject["key"]) for reject in rejected)
    contents = {(split, sample.key): sample.content for split, sample in CONVERTERS[name](folder, folder)}
    for path in out.glob("*/index.json"):
        index = ShardIndex(path.parent)
        for shard, num_samples in enumerate(index.samples_per_shard):
            for sample in range(num_samples):
                entry = (index.split, index.key(shard, sample))
                done[entry] += 1
                assert json.loads(index.read(shard, sample)["json"]) == contents[entry]
        index.close()
    assert done == wanted
