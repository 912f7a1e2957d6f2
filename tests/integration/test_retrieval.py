"""Retrieval fine-tuning as a command: it starts from exported weights, and ranks every held-out caption and image."""

import json

import pytest
import torch

from tests.data.conftest import coco  # noqa: F401  (fixture)
from unimo3.data.captioned import CaptionedImages
from unimo3.data.index import ShardIndex
from unimo3.data.loader import ReaderArgs
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.distributed import World
from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
from unimo3.objectives.retrieval import RetrievalLoss
from unimo3.training.evaluation import Unguarded
from unimo3.training.heartbeat import read_heartbeats
from unimo3.training.metrics import read_metrics
from unimo3.training.retrieval.args import RankingArgs
from unimo3.training.retrieval.evaluation import held_out_recall

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("commands")]


@pytest.fixture(scope="module")
def run(program, weights, coco, recipe, runs):  # noqa: F811
    program.check(
        2,
        "finetune.retrieval",
        "--init",
        weights,
        "--run.dir",
        runs,
        "--run.name",
        "retrieval",
        "--data.train",
        coco / "train",
        "--data.val",
        coco / "val",
        "--data.tokenizer",
        weights,
        "--data.max_text_tokens",
        "16",
        "--data.num_workers",
        "1",
        "--optim.lr",
        "1e-3",
        "--training.steps",
        "4",
        "--training.global_batch",
        "8",
        "--training.micro_batch",
        "4",
        "--training.eval_every",
        "2",
        "--training.ds_config",
        recipe.parent / "fp32.json",
        "--ranking.shortlist",
        "2",
        "--ranking.fold_images",
        "1",
    )
    return runs / "retrieval"


def test_retrieval_trains_and_measures_recall(run):
    losses = [record["loss"] for record in read_metrics(run)]
    assert len(losses) == 4
    assert all(record["loss_itc"] > 0 and record["loss_itm"] > 0 for record in read_metrics(run))
    recall = json.loads((run / "recall.json").read_text())
    evaluations = read_metrics(run, group="eval")
    assert [record["step"] for record in evaluations] == [2, 4]
    assert {name: evaluations[-1][name] for name in recall} == recall
    # Four images of six captions: k is beyond the candidates.
    assert recall["ir_at_5"] == recall["ir_at_10"] == recall["tr_at_1_fold"] == 1
    assert recall["num_pairs"] <= 4 * 2 + 24 * 2 + 24
    assert json.loads((run / "best.json").read_text())["metric"] == "recall_mean"


def test_exported_weights_of_retrieval_give_the_runs_metrics(program, run, coco, recipe):  # noqa: F811
    out = recipe.parent / "retrieval_weights"
    program.check(0, "pretrain.export", run, "--out", out, "--dtype", "fp32")
    task = RetrievalLoss(Unimo3ForImageAndTextRetrieval.from_pretrained(out), seed=0)
    task.device = torch.device("cpu")
    samples = CaptionedImages(ShardIndex(coco / "val"), load_tokenizer(str(out)), 16, ImageTransform(32))
    ranking = RankingArgs(shortlist=2, fold_images=1)
    recall = held_out_recall(task, samples, World(0, 0, 1), 4, ReaderArgs(0, 1), ranking, Unguarded())
    assert recall == json.loads((run / "recall.json").read_text())


def test_a_stopped_evaluation_writes_no_metrics_and_can_be_repeated(
    program,
    weights,
    coco,  # noqa: F811
    recipe,
    runs,
):
    # All pairs of the training split, one at a time: thousands of batches.
    command = (
        2,
        "finetune.retrieval",
        "--eval-only",
        "true",
        "--init",
        weights,
        "--run.dir",
        runs,
        "--run.name",
        "cut_off",
        "--data.val",
        coco / "train",
        "--data.tokenizer",
        weights,
        "--data.max_text_tokens",
        "16",
        "--data.num_workers",
        "1",
        "--training.global_batch",
        "8",
        "--training.micro_batch",
        "4",
        "--training.ds_config",
        recipe.parent / "fp32.json",
        "--ranking.shortlist",
        "0",
    )
    run = runs / "cut_off"
    status = program.run(
        *command,
        "--ranking.pair_batch",
        "1",
        stop_when=lambda: sum(beat.phase == "evaluate" for beat in read_heartbeats(run)) == 2,
    )
    assert status == 75, program.output[-4000:]
    assert "asked to stop (SIGTERM) during the evaluation of step 0 in" in program.output
    assert not list(run.glob("recall*.json"))
    assert read_metrics(run, group="eval") == []
    program.check(*command)
    (file,) = run.glob("recall*.json")
    recall = json.loads(file.read_text())
    samples = ShardIndex(coco / "train").samples_per_shard
    assert recall["num_pairs"] == sum(samples) * 6 * sum(samples)
