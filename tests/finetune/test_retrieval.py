"""Settings of retrieval that cannot be, its recipes, and its evaluation without training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from finetune.retrieval import Retrieval, RetrievalConfig
from finetune.task import HeldOut, InputSettings
from tests.data.conftest import index_again, write_tar
from tests.data.test_identity import described
from unimo3.config import collect_errors
from unimo3.data.args import DataArgs
from unimo3.data.captioned import CaptionedImages
from unimo3.data.index import ShardIndex
from unimo3.data.loader import ReaderArgs
from unimo3.data.order import Unit
from unimo3.data.transforms import ImageTransform, normalize
from unimo3.distributed import World
from unimo3.metrics.recall import first_ranks, recalls
from unimo3.model.pretrained import load_exported, read_exported_config
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.training.args import TrainingArgs
from unimo3.training.evaluation import Unguarded
from unimo3.training.retrieval.args import RankingArgs
from unimo3.training.run import RunArgs

RECIPES = sorted((Path(__file__).parents[2] / "finetune" / "recipes").glob("retrieval_*.yaml"))
# Learning rate, batch, epochs and training captions as published.
PUBLISHED = {"flickr30k": (5e-6, 512, 20, 145_000), "coco": (4.5e-6, 256, 30, 566_747)}


def settings(coco, pretrained, tmp_path, **ranking):
    return RetrievalConfig(
        run=RunArgs(dir=str(tmp_path / "runs")),
        init=str(pretrained),
        data=DataArgs(train=str(coco / "train"), val=str(coco / "val"), tokenizer=str(pretrained), max_text_tokens=12),
        training=TrainingArgs(global_batch=8, micro_batch=4),
        ranking=RankingArgs(**ranking),
    )


def test_valid_settings_have_no_error(coco, pretrained, tmp_path):
    assert collect_errors(settings(coco, pretrained, tmp_path, fold_images=2)) == []


def test_folds_that_do_not_divide_and_an_empty_batch_are_named_together(coco, pretrained, tmp_path):
    errors = collect_errors(settings(coco, pretrained, tmp_path, fold_images=3, pair_batch=0))
    assert [problem.split(";")[0] for problem in errors] == [
        "ranking.pair_batch: 0: at least 1 is needed",
        "ranking.fold_images: 3: the 4 images of data.val are no whole number of folds",
    ]


def test_folds_are_of_images_not_of_samples(coco, pretrained, tmp_path):
    val = tmp_path / "val"
    val.mkdir()
    contents = [{"image_id": number % 4, "caption": "a"} for number in range(6)]
    write_tar(val / "0.tar", [(str(number), described(number, content)) for number, content in enumerate(contents)])
    index_again(val, split="val")
    made = settings(coco, pretrained, tmp_path, fold_images=4)
    assert collect_errors(replace(made, data=replace(made.data, val=str(val)))) == []
    made = settings(coco, pretrained, tmp_path, fold_images=3)
    (problem,) = collect_errors(replace(made, data=replace(made.data, val=str(val))))
    assert problem.startswith("ranking.fold_images: 3: the 4 images of data.val")


@pytest.mark.parametrize("path", [path for path in RECIPES if "tiny" not in path.stem], ids=lambda path: path.stem)
def test_recipes_have_the_published_settings(path):
    recipe = yaml.safe_load(path.read_text())
    lr, batch, num_epochs, num_captions = PUBLISHED[path.stem.split("_")[1]]
    assert (recipe["optim"]["lr"], recipe["training"]["global_batch"]) == (lr, batch)
    assert (recipe["optim"]["fusion_factor"], recipe["optim"]["head_factor"]) == (5.0, 5.0)
    assert recipe["training"]["steps"] == round(num_epochs * num_captions / batch)
    assert recipe["image_size"] == (384 if path.stem.endswith("base") else 378)
    assert RankingArgs(**recipe["ranking"]).validate() == []


def test_evaluation_alone_gives_the_recall_of_pretrainings_heads(pretrained, tokenizer, tmp_path):
    # No text is repeated: scores of equal texts may differ in their last bits.
    contents = [{"image_id": number, "captions": [f"{number} dogs", f"picture {number}"]} for number in range(12)]
    write_tar(
        tmp_path / "0.tar", [(str(number), described(number, content)) for number, content in enumerate(contents)]
    )
    index_again(tmp_path, split="test")
    task = Retrieval(RankingArgs(shortlist=0), seed=0)
    model = task.model_class()(read_exported_config(str(pretrained)))
    load_exported(model, str(pretrained), fresh=r"^$")  # as with eval_only: no head may start random
    objective = task.objective(model)
    objective.device = torch.device("cpu")
    index = ShardIndex(tmp_path)
    reading = InputSettings(tokenizer, 12, ImageTransform(16), 0)
    results = task.evaluate(objective, HeldOut(index, reading, World(0, 0, 1), 8, ReaderArgs(0, 1)), Unguarded())
    expected = recall_of_pretraining(pretrained, CaptionedImages(index, tokenizer, 12, ImageTransform(16)))
    assert 0 < expected["recall_mean"] < 1
    assert {name: value for name, value in results.metrics.items() if name != "num_pairs"} == pytest.approx(expected)


def recall_of_pretraining(weights, samples):
    """Recall by the matching and the contrastive head of the pretraining model, of every pair."""
    model = Unimo3ForPreTraining.from_pretrained(weights).eval()
    units = [Unit(0, shard, unit) for shard, count in enumerate(samples.units_per_shard) for unit in range(count)]
    rows = [samples.build(unit) for unit in units]
    pixels = normalize(torch.tensor(np.stack([row["images"]() for row in rows])))
    texts = [(image, *text) for image, row in enumerate(rows) for text in row["texts"]]
    ids, masks = (torch.tensor(np.stack([text[part] for text in texts])) for part in (1, 2))
    by_head = {"": [], "_towers": []}
    for image in pixels:
        with torch.no_grad():
            out = model(ids, image.expand(len(ids), -1, -1, -1), masks)
        by_head[""].append(out.matching_logits[:, 1] - out.matching_logits[:, 0])
        by_head["_towers"].append(out.logits_per_image.diagonal())
    is_right = torch.tensor([image for image, *_ in texts])[None] == torch.arange(len(rows))[:, None]
    metrics = {}
    for suffix, scores in by_head.items():
        of_images = torch.stack(scores)
        recall = recalls(first_ranks(of_images, is_right), first_ranks(of_images.T, is_right.T))
        metrics |= {f"{name}{suffix}": value for name, value in recall.items()}
    return metrics
