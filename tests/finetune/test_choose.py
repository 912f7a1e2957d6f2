"""The evaluation of choices as a program: its settings, what it starts from, and what it writes."""

import json

import numpy as np
import pytest
import torch

from finetune.choose import ChooseConfig
from tests.finetune.tuning import choose_settings
from tests.spawn import ROOT
from unimo3 import config
from unimo3.config import collect_errors
from unimo3.data.transforms import ImageTransform, normalize
from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
from unimo3.training.metrics import read_metrics

pytestmark = pytest.mark.xdist_group("finetune")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "retrieval.json").write_text('{"zero_optimization": {"stage": 3}}')
    return tmp_path


def test_pretrainings_weights_need_no_training_data_and_no_step(pretrained, choices, folder):
    for name in ("sugarcrepe", "winoground"):
        assert collect_errors(choose_settings(pretrained, pretrained, choices / name / "test", folder)) == []


def test_the_recipe_is_used_completely(pretrained, choices, tmp_path):
    data = ("--data.val", choices / "sugarcrepe" / "test", "--data.tokenizer", pretrained)
    words = ("--config", ROOT / "finetune/recipes/choose_tiny.yaml", "--init", pretrained, "--run.dir", tmp_path, *data)
    assert config.parse(ChooseConfig, list(map(str, words)), "", "").run.name == "choose_tiny"


def test_training_is_refused(pretrained, choices, folder):
    settings = choose_settings(pretrained, pretrained, choices / "winoground" / "test", folder, eval_only=False)
    assert collect_errors(settings) == ["eval_only: false: this task trains nothing; leave it out"]


def test_shards_without_choices_and_weights_of_another_task_are_named(coco, pretrained, tuned, choices, folder):
    (problem,) = collect_errors(choose_settings(pretrained, pretrained, coco / "val", folder))
    assert "its samples have no choices (coco, val); name other shards" in problem
    (problem,) = collect_errors(
        choose_settings(tuned / "vqa_weights", pretrained, choices / "winoground" / "test", folder)
    )
    assert "contains weights of Unimo3ForVisualQuestionAnswering, this task tunes" in problem


def test_a_runs_checkpoint_is_evaluated_and_its_results_are_written(tuned, tokenizer, choices):
    """The weights are those of a run, which is exported first."""
    run = tuned / "choose"
    entries = [json.loads(line) for line in (run / "predictions_test.jsonl").read_text().splitlines()]
    assert [entry["identifier"] for entry in entries] == ["0", "1", "2"]
    model = Unimo3ForImageAndTextRetrieval.from_pretrained(tuned / "retrieval_weights").eval()
    source = choices.parent / "source"
    record = json.loads((source / "examples.jsonl").read_text().splitlines()[1])
    text = tokenizer(record["caption_1"], padding="max_length", max_length=12, return_tensors="pt")
    pixels = ImageTransform(16)((source / f"images/{record['image_0']}.png").read_bytes(), np.random.default_rng(0))
    with torch.no_grad():
        out = model(text["input_ids"], normalize(torch.tensor(pixels[None])), text["attention_mask"])
    assert entries[1]["itm"][0][1] == pytest.approx((out.logits[0, 1] - out.logits[0, 0]).item(), abs=1e-4)
    assert entries[1]["itc"][0][1] == pytest.approx((out.text_embeds @ out.image_embeds.T).item(), abs=1e-5)
    assert "| group, overall | 3 |" in (run / "report_test.md").read_text()
    accuracy = json.loads((run / "accuracy_test.json").read_text())
    (evaluation,) = read_metrics(run, group="eval")
    assert evaluation["split"] == "test"
    assert evaluation["itm_group"] == accuracy["group"]["itm"]["overall"]
    assert not (run / "checkpoints").exists()
