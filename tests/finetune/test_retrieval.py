"""Settings of retrieval that cannot be, and its recipes: reported before anything starts."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from finetune.retrieval import RetrievalConfig
from tests.data.conftest import index_again, write_tar
from tests.data.test_identity import described
from unimo3.config import collect_errors
from unimo3.data.args import DataArgs
from unimo3.training.args import TrainingArgs
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
