"""Recipes: every setting is known, and length, batch and resolution are the published ones."""

import math
from pathlib import Path

import pytest
import yaml

from finetune.nlvr2 import Nlvr2Config
from finetune.snli_ve import SnliVeConfig
from finetune.vqa import VqaConfig
from tests.spawn import ROOT
from unimo3 import config

RECIPES = ROOT / "finetune" / "recipes"
# Configuration, the fixture of its shards; of the public data: training units, epochs, batch, rate, factor of the head.
TASKS = {
    "vqa": (VqaConfig, "vqa", 443_757, 10, 512, 1e-5, 50),
    "nlvr2": (Nlvr2Config, "nlvr2", 86_373, 10, 64, 6e-6, 10),
    "snli_ve": (SnliVeConfig, "snli_ve", 529_527, 5, 64, 3e-6, 10),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", ["tiny", "base", "large"])
def test_a_recipe_is_used_completely(request, pretrained, tmp_path, task, size):
    kind, fixture, *_ = TASKS[task]
    shards: Path = request.getfixturevalue(fixture)
    # The weights of these tests are not the recipe's.
    words = ("--image_size", "0", "--data.max_text_tokens", "12", "--run.dir", str(tmp_path), "--init", str(pretrained))
    data = (
        "--data.train",
        str(shards / "train"),
        "--data.val",
        str(shards / "val"),
        "--data.tokenizer",
        str(pretrained),
    )
    settings = config.parse(kind, ["--config", str(RECIPES / f"{task}_{size}.yaml"), *words, *data], "", "")
    assert settings.run.name == f"{task}_{size}"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("size", "patch"), [("base", 16), ("large", 14)])
def test_a_recipe_has_the_published_settings(task, size, patch):
    *_, num_units, epochs, batch, rate, head = TASKS[task]
    recipe = yaml.safe_load((RECIPES / f"{task}_{size}.yaml").read_text())
    training, optim = recipe["training"], recipe["optim"]
    assert training["steps"] == math.ceil(num_units * epochs / batch)
    assert (training["global_batch"], optim["lr"], optim["head_factor"], optim["fusion_factor"]) == (
        batch,
        rate,
        head,
        5,
    )
    published = 576 if task == "vqa" else 384
    assert recipe["image_size"] == round(published / patch) * patch
    assert recipe["checkpoint"]["every_steps"] == training["eval_every"]
