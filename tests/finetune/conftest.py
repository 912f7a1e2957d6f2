"""Small sources of NLVR2 and SNLI-VE as shards, and exported weights, for complete evaluations and programs."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from pretrain import export
from tests.data.conftest import coco, convert, draw_jpeg, source, vqav2, write_source  # noqa: F401  (fixtures)
from tests.finetune.tuning import tune_all
from tests.spawn import run_alone
from tests.tiny import tiny_config, tiny_pretraining_model
from unimo3.data.formats.sugarcrepe import CATEGORIES
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import image_processor
from unimo3.model.initialization import initialize_weights
from unimo3.model.processor import Unimo3Processor

# A sentence of two pairs, and others of one; numbers of examples that 2 and 3 do not divide.
NLVR2 = ("0-0-0", "0-1-0", "0-0-1", "1-0-0", "2-0-0", "3-0-0", "4-0-0")
LABELS = ("entailment", "neutral", "contradiction")
NUM_HYPOTHESES = 11
VOCABULARY = 400


def write_nlvr2(root: Path) -> Path:
    """The same examples in each split."""
    for split, folder in (("train", "images/train"), ("dev", "dev"), ("test1", "test1")):
        lines = []
        (root / folder).mkdir(parents=True)
        for number, name in enumerate(NLVR2):
            identifier = f"{split}-{name}"
            pair = identifier.rpartition("-")[0]
            for side in range(2):
                (root / folder / f"{pair}-img{side}.png").write_bytes(draw_jpeg(10 * number + side))
            lines.append({"identifier": identifier, "sentence": f"{number} dogs", "label": str(number % 3 == 0)})
        (root / f"{split}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def write_snli_ve(root: Path) -> Path:
    """The same hypotheses in each split, about different photos."""
    (root / "flickr30k-images").mkdir(parents=True)
    for start, split in enumerate(("train", "dev", "test")):
        lines = []
        for number in range(NUM_HYPOTHESES):
            photo = str(100 * start + number // 3)
            (root / "flickr30k-images" / f"{photo}.jpg").write_bytes(draw_jpeg(int(photo)))
            lines.append(
                {
                    "Flickr30K_ID": photo,
                    "sentence2": f"{number} dogs",
                    "gold_label": LABELS[number % 3],
                    "pairID": f"{photo}.jpg#{number}r1e",
                }
            )
        (root / f"snli_ve_{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="session")
def vqa(tmp_path_factory) -> Path:
    """VQAv2 with 19 held-out questions."""
    root = tmp_path_factory.mktemp("vqa")
    write_source(root / "source", num_images=22)
    arguments = ("--src", str(root / "source"), "--out", str(root / "shards"), "--shard-size", "4")
    assert convert("vqav2", *arguments, "--min-answer-count", "3") == 0
    return root / "shards"


@pytest.fixture(scope="session")
def nlvr2(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("nlvr2")
    write_nlvr2(root / "source")
    assert convert("nlvr2", "--src", str(root / "source"), "--out", str(root / "shards"), "--shard-size", "3") == 0
    return root / "shards"


@pytest.fixture(scope="session")
def snli_ve(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("snli_ve")
    write_snli_ve(root / "source")
    assert convert("snli_ve", "--src", str(root / "source"), "--out", str(root / "shards"), "--shard-size", "2") == 0
    return root / "shards"


def write_choices(root: Path) -> Path:
    """SugarCrepe with 13 examples, whose images have one or two, and Winoground with three."""
    (root / "val2017").mkdir(parents=True)
    (root / "images").mkdir()
    for number, category in enumerate(CATEGORIES):
        (root / "val2017" / f"{number}.jpg").write_bytes(draw_jpeg(number))
        texts = {"caption": f"{number} dogs", "negative_caption": f"dogs {number}"}
        records = {str(n): {"filename": f"{number}.jpg", **texts} for n in range(1 if category == "add_att" else 2)}
        (root / f"{category}.json").write_text(json.dumps(records))
    lines = []
    for number in range(3):
        record = {"id": number, "collapsed_tag": "Object" if number else "Relation"}
        for side in range(2):
            (root / "images" / f"{number}{side}.png").write_bytes(draw_jpeg(50 + 2 * number + side))
            record |= {f"image_{side}": f"{number}{side}", f"caption_{side}": f"{number + side} dogs"}
        lines.append(json.dumps(record) + "\n")
    (root / "examples.jsonl").write_text("".join(lines))
    return root


@pytest.fixture(scope="session")
def choices(tmp_path_factory) -> Path:
    """FOLDER/sugarcrepe and FOLDER/winoground."""
    root = tmp_path_factory.mktemp("choices")
    write_choices(root / "source")
    for name in ("sugarcrepe", "winoground"):
        arguments = ("--src", str(root / "source"), "--out", str(root / "shards" / name), "--shard-size", "5")
        assert convert(name, *arguments) == 0
    return root / "shards"


@pytest.fixture(scope="session")
def tokenizer(coco) -> PreTrainedTokenizerBase:  # noqa: F811
    return load_tokenizer(str(coco / "tokenizer"))


@pytest.fixture(scope="session")
def pretrained(tokenizer, tmp_path_factory) -> Path:
    """The content of an export of pretraining, with random weights; images of 16 pixels, patches of 8."""
    folder = tmp_path_factory.mktemp("weights") / "pretrained"
    text = tiny_config().text_config.to_dict()
    text |= {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "num_hidden_layers": 1}
    vision = {"image_size": 16, "overrides": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}}
    model = tiny_pretraining_model(text_config=text, vision_config=vision, num_hidden_layers=2)
    # Of such a spread that predictions differ from row to row.
    initialize_weights(model, 2, std=0.8)
    model.save_pretrained(folder)
    Unimo3Processor(image_processor(16), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tuned(pretrained, vqa, nlvr2, snli_ve, coco, choices, tmp_path_factory) -> Path:  # noqa: F811
    """A run of each task after two steps, and its export: FOLDER/vqa, FOLDER/vqa_weights and so on; FOLDER/choose."""
    folder = tmp_path_factory.mktemp("tuned_runs")
    shards = tmp_path_factory.mktemp("tuned_shards")
    made = {"vqa": vqa, "nlvr2": nlvr2, "snli_ve": snli_ve, "retrieval": coco, "winoground": choices / "winoground"}
    for name, target in made.items():
        (shards / name).symlink_to(target)
    run_alone(tune_all, pretrained, shards, folder)
    for name in ("vqa", "nlvr2", "snli_ve", "retrieval"):
        dtype = "bf16" if name == "nlvr2" else "fp32"
        with pytest.raises(SystemExit) as end:
            export.main([str(folder / name), "--out", str(folder / f"{name}_weights"), "--dtype", dtype])
        assert not end.value.code
    return folder


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(draw_jpeg(5))
    return path
