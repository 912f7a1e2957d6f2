"""Each training program on a set with damaged samples: it counts each, or ends with one error; none is lost."""

import json
import re
import shutil

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.data.conftest import coco  # noqa: F401  (fixture)
from tests.finetune.conftest import pretrained, tokenizer  # noqa: F401  (fixtures)
from tests.finetune.damage import (
    NUM_GOOD,
    PICTURES,
    damaged,
    nlvr2_content,
    pretraining_content,
    snli_ve_content,
    vqa_content,
    write_shards,
)
from tests.integration.conftest import MODEL
from unimo3.data.answers import AnswerVocabulary
from unimo3.errors import EXIT_CONFIG
from unimo3.training.metrics import read_metrics

pytestmark = pytest.mark.integration

MAX_DAMAGED = 4
# Content of a sample, its list of items, its images, and the name of the file that must list every held-out item.
PROGRAMS = {
    "pretrain.train": (pretraining_content, None, ["jpg"], None),
    "finetune.retrieval": (pretraining_content, None, ["jpg"], None),
    "finetune.vqa": (vqa_content, "questions", ["jpg"], "predictions*.json"),
    "finetune.snli_ve": (snli_ve_content, "hypotheses", ["jpg"], "predictions*.jsonl"),
    "finetune.nlvr2": (nlvr2_content, None, ["0.jpg", "1.jpg"], "predictions*.csv"),
}
# Without shrinking: each example is a complete program.
few = settings(
    max_examples=8,
    phases=[Phase.generate],
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("damaged_sets")
    (made / "fp32.json").write_text('{"zero_optimization": {"stage": 2}}')
    AnswerVocabulary(["no", "yes"]).save_pretrained(made)
    return made


def write_recipe(folder, module, index, weights):
    """Settings by which one step reads every unit once, and an evaluation then scores each."""
    kind = PROGRAMS[module][1]
    total = int((index.samples_per_shard if kind is None else index.items_per_shard(kind)).sum())
    recipe = {
        "run": {"dir": str(folder / "runs"), "name": "damaged"},
        "data": {
            "train": str(folder / "shards"),
            "val": str(folder / "shards"),
            "tokenizer": str(weights),
            "max_text_tokens": 12,
            "num_workers": 0,
            "max_bad_ratio": 0.99,
            "ledger": True,
        },
        "training": {
            "steps": 1,
            "global_batch": total,
            "micro_batch": total,
            "ds_config": str(folder / "fp32.json"),
            "eval_every": 1,
        },
    }
    if module == "pretrain.train":
        towers = {name: MODEL[name] | {size: 1} for name, size in (("text", "num_hidden_layers"), ("vision", "depth"))}
        recipe["model"] = MODEL | towers | {"num_hidden_layers": 1}
    else:
        recipe["init"] = str(weights)
    if module == "finetune.vqa":
        recipe["answers"] = str(folder / "answers.json")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path, total


def num_predictions(path):
    text = path.read_text()
    return len(json.loads(text)) if path.suffix == ".json" else len(text.splitlines())


@pytest.mark.parametrize("module", PROGRAMS)
@few
@given(data=st.data())
def test_a_program_counts_damaged_samples_or_ends(program, folder, pretrained, module, data):  # noqa: F811
    content_of, _, images, predictions = PROGRAMS[module]
    damage = [
        (data.draw(st.integers(0, NUM_GOOD)), data.draw(damaged(content_of(NUM_GOOD + number))), data.draw(PICTURES))
        for number in range(data.draw(st.integers(1, MAX_DAMAGED)))
    ]
    for made in ("shards", "runs"):
        shutil.rmtree(folder / made, ignore_errors=True)
    (folder / "shards").mkdir()
    index = write_shards(folder / "shards", content_of, images, damage)
    recipe, total = write_recipe(folder, module, index, pretrained)
    status = program.run(1, module, "--config", recipe)
    run = folder / "runs" / "damaged"

    assert status in (0, EXIT_CONFIG), program.output
    assert "Traceback" not in program.output
    errors = re.findall(r"^\w*Error: ", program.output, re.MULTILINE)
    assert len(errors) == (status == EXIT_CONFIG), program.output
    records = read_metrics(run)
    if status == 0:
        assert len(records) == 1
    for record in records:
        (line,) = map(json.loads, (run / "ledger" / "rank_00000.jsonl").read_text().splitlines())
        keys = {(shard, key) for _, shard, _, key in line["samples"]}
        assert record["bad_samples"] == total - len(keys)
        assert (status == 0) == (record["bad_samples"] == 0)
    if status == 0 and predictions is not None:
        (path,) = run.glob(predictions)
        assert num_predictions(path) == total
