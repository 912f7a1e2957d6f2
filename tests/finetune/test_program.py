"""Settings of fine-tuning that cannot be: each gives one error that names the field, the value and the fix."""

import dataclasses
import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from finetune.nlvr2 import Nlvr2, Nlvr2Config
from finetune.retrieval import RetrievalConfig
from finetune.snli_ve import SnliVeConfig
from finetune.vqa import VqaConfig
from tests.tiny import tiny_config
from tests.waiting import text_of, wait_for
from unimo3 import config
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.args import DataArgs
from unimo3.model.downstream import Unimo3ForImagesAndTextClassification, Unimo3ForVisualQuestionAnswering
from unimo3.training.args import TrainingArgs
from unimo3.training.early_stopping import BestArgs
from unimo3.training.heartbeat import Heartbeat
from unimo3.training.run import RunArgs

BATCH = {"global_batch": 8, "micro_batch": 4}


def settings(kind, shards, weights, tmp_path, data=(), training=(), **changes):
    folders = {"train": str(shards / "train"), "val": str(shards / "val"), "tokenizer": str(weights)}
    return kind(
        run=RunArgs(dir=str(tmp_path / "runs")),
        init=str(weights),
        data=DataArgs(**(folders | {"max_text_tokens": 12} | dict(data))),
        training=TrainingArgs(**(BATCH | dict(training))),
        **changes,
    )


@pytest.fixture(scope="module")
def tuned_vqa(pretrained, tmp_path_factory):
    """Exported weights of a model that was tuned for VQA on two answers."""
    folder = tmp_path_factory.mktemp("tuned") / "vqa"
    shutil.copytree(pretrained, folder)
    config = Unimo3ForVisualQuestionAnswering.config_class.from_pretrained(pretrained)
    config.num_answers = 2
    Unimo3ForVisualQuestionAnswering(config).save_pretrained(folder)
    AnswerVocabulary(["dog", "yes"]).save_pretrained(folder)
    return folder


def test_valid_settings_have_no_error(nlvr2, snli_ve, vqav2, pretrained, tmp_path):
    for kind, shards in ((Nlvr2Config, nlvr2), (SnliVeConfig, snli_ve), (VqaConfig, vqav2)):
        assert settings(kind, shards, pretrained, tmp_path).validate() == []


@pytest.mark.parametrize("split", ["test", "test-dev"])
def test_nothing_is_trained_on_a_test_split(nlvr2, pretrained, tmp_path, split):
    shutil.copytree(nlvr2 / "test", tmp_path / split)
    index = tmp_path / split / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"split": split}))
    (problem,) = settings(Nlvr2Config, nlvr2, pretrained, tmp_path, {"train": str(tmp_path / split)}).validate()
    assert problem.startswith(f"data.train: '{tmp_path / split}': is the split {split} of nlvr2, to be tested on")
    assert settings(Nlvr2Config, nlvr2, pretrained, tmp_path, {"val": str(tmp_path / split)}).validate() == []


def test_a_split_that_is_missing_is_named(nlvr2, pretrained, tmp_path):
    (problem,) = settings(Nlvr2Config, nlvr2, pretrained, tmp_path, {"val": str(nlvr2 / "dev")}).validate()
    assert problem.startswith(f"data.val: '{nlvr2 / 'dev'}': {nlvr2 / 'dev' / 'index.json'}: cannot be read")
    (problem,) = settings(Nlvr2Config, nlvr2, pretrained, tmp_path, {"val": str(nlvr2)}).validate()
    assert "name one of its splits, test, train, val" in problem


def test_shards_of_another_task_are_named(nlvr2, snli_ve, pretrained, tmp_path):
    (problem,) = settings(Nlvr2Config, nlvr2, pretrained, tmp_path, {"val": str(snli_ve / "val")}).validate()
    assert "its samples have no statement (snli_ve, val); name other shards" in problem


def test_an_image_size_the_patch_does_not_divide_is_named_with_two_fixes(nlvr2, pretrained, tmp_path):
    (problem,) = settings(Nlvr2Config, nlvr2, pretrained, tmp_path, image_size=30).validate()
    assert problem == "image_size: 30: not a multiple of the patch size 8; use 24 or 32"
    (problem,) = settings(Nlvr2Config, nlvr2, pretrained, tmp_path, image_size=-8).validate()
    assert problem.startswith("image_size: -8: ")
    assert settings(Nlvr2Config, nlvr2, pretrained, tmp_path, image_size=32).validate() == []


def test_weights_of_another_task_are_named(nlvr2, tuned_vqa, tmp_path):
    (problem,) = settings(Nlvr2Config, nlvr2, tuned_vqa, tmp_path).validate()
    assert problem.startswith(f"init: '{tuned_vqa}': contains weights of Unimo3ForVisualQuestionAnswering, this task")


def test_tuned_weights_use_the_vocabulary_saved_with_them(vqav2, tuned_vqa, tmp_path):
    tuning = settings(VqaConfig, vqav2, tuned_vqa, tmp_path)
    assert tuning.answers_path == tuned_vqa / "answers.json"
    assert tuning.validate() == []


@pytest.mark.parametrize("answers", [["dog", "yes", "no"], ["yes", "dog"]], ids=["size", "order"])
def test_a_vocabulary_other_than_the_weights_is_named(vqav2, tuned_vqa, tmp_path, answers):
    AnswerVocabulary(answers).save(tmp_path / "answers.json")
    (problem,) = settings(VqaConfig, vqav2, tuned_vqa, tmp_path, answers=str(tmp_path / "answers.json")).validate()
    assert problem.startswith(f"answers: '{tmp_path / 'answers.json'}': lists {len(answers)} answers that are not")


def test_evaluation_alone_needs_no_training_data(nlvr2, pretrained, tmp_path):
    (problem,) = settings(Nlvr2Config, nlvr2, pretrained, tmp_path, {"train": ""}, eval_only=True).validate()
    assert problem.startswith(
        f"eval_only: true: the run has no checkpoint, and init '{pretrained}' contains no weights"
    )
    errors = settings(Nlvr2Config, nlvr2, pretrained, tmp_path, {"val": None}, eval_only=True).validate()
    assert errors[0] == "eval_only: true: data.val names nothing to evaluate on; name held-out shards"
    folder = tmp_path / "tuned"
    shutil.copytree(pretrained, folder)
    config = Unimo3ForImagesAndTextClassification.config_class.from_pretrained(pretrained)
    Nlvr2().configure(config)
    Unimo3ForImagesAndTextClassification(config).save_pretrained(folder)
    assert settings(Nlvr2Config, nlvr2, folder, tmp_path, {"train": ""}, eval_only=True).validate() == []
    (problem,) = settings(Nlvr2Config, nlvr2, folder, tmp_path, {"train": ""}, eval_only=True, image_size=24).validate()
    assert problem == "image_size: 24: the weights were tuned at 16, and none are trained here; leave it out"


def test_evaluation_alone_accepts_any_settings_of_training(nlvr2, pretrained, tmp_path):
    def started_with(**changes):
        errors = settings(Nlvr2Config, nlvr2, pretrained, tmp_path, training={"steps": 7}, **changes).validate()
        return [problem.partition(":")[0] for problem in errors if "this run was started with" in problem]

    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    config.save(settings(Nlvr2Config, nlvr2, pretrained, tmp_path), folder / "config.yaml")
    assert started_with() == ["training.steps"]
    assert started_with(eval_only=True, data={"window_shards": 3}) == []
    assert started_with(eval_only=True, data={"max_text_tokens": 11}) == ["data.max_text_tokens"]
    assert started_with(eval_only=True, image_size=24) == ["image_size"]


def test_what_follows_from_another_error_is_not_reported(vqav2, pretrained, tmp_path):
    gone = {"train": str(tmp_path / "gone" / "train")}
    (problem,) = settings(VqaConfig, vqav2, pretrained, tmp_path, gone).validate()
    assert problem.startswith("data.train: ")


def test_patience_needs_evaluations(nlvr2, pretrained, tmp_path):
    (problem,) = settings(Nlvr2Config, nlvr2, pretrained, tmp_path, best=BestArgs(patience=2)).validate()
    assert problem.startswith("best.patience: 2: counts evaluations; set data.val and training.eval_every")
    assert BestArgs(patience=-1).validate()[0].startswith("best.patience: -1: ")
    assert BestArgs(keep=False, patience=1).validate()[0].endswith("set best.keep to true")


def test_shards_without_a_sample_are_named(nlvr2, pretrained, tmp_path):
    shutil.copytree(nlvr2 / "val", tmp_path / "val")
    index = tmp_path / "val" / "index.json"
    nothing = {"shards": [], "num_samples": 0, "num_items": 0, "members_sha256": hashlib.sha256(b"").hexdigest()}
    index.write_text(json.dumps(json.loads(index.read_text()) | nothing))
    (tmp_path / "val" / "index.members").write_bytes(b"")
    (problem,) = settings(Nlvr2Config, nlvr2, pretrained, tmp_path, {"val": str(tmp_path / "val")}).validate()
    assert problem == f"data.val: '{tmp_path / 'val'}': contains no sample (nlvr2, val); name other shards"


@pytest.fixture
def process():
    """Another one that lives."""
    sleeping = subprocess.Popen(["sleep", "infinity"])
    yield sleeping
    sleeping.kill()
    sleeping.wait()


@pytest.mark.integration
def test_a_run_in_use_is_not_evaluated_in(nlvr2, pretrained, tmp_path, process):
    folder = tmp_path / "runs" / "run"
    (folder / "heartbeats").mkdir(parents=True)

    def errors_after(**changes):
        beat = Heartbeat(0, socket.gethostname(), process.pid, 7, "compute", 9, time.time(), time.time())
        path = folder / "heartbeats" / "rank_00000.json"
        path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(beat, **changes))))
        errors = settings(Nlvr2Config, nlvr2, pretrained, tmp_path, {"train": ""}, eval_only=True).validate()
        return [problem for problem in errors if "is in use" in problem]

    (problem,) = errors_after()
    assert problem.startswith(f"eval_only: true: {folder} is in use, rank 0 is at step 7 (pid {process.pid} on ")
    assert errors_after(host="another")
    assert not errors_after(host="another", time=time.time() - 60)
    assert not errors_after(phase="ended")
    assert not errors_after(rank=1)
    assert not errors_after(pid=os.getpid())
    process.kill()
    status = text_of(Path(f"/proc/{process.pid}/status"))
    wait_for(lambda: "Z (zombie)" in status(), "the end of the process", status)
    assert not errors_after()


def test_retrieval_needs_two_pairs_within_a_micro_step(coco, pretrained, tmp_path):
    alone = {"global_batch": 8, "micro_batch": 1}
    (problem,) = settings(RetrievalConfig, coco, pretrained, tmp_path, training=alone).validate()
    assert problem.startswith("training.micro_batch: 1: contrast and matching draw wrong partners in a micro-step")


def test_all_errors_are_reported_together(nlvr2, pretrained, tmp_path):
    errors = settings(
        Nlvr2Config,
        nlvr2,
        pretrained,
        tmp_path,
        {"train": str(nlvr2 / "test"), "val": "nowhere"},
        {"micro_batch": 3},
        image_size=30,
    ).validate()
    assert [problem.partition(":")[0] for problem in errors] == [
        "training.global_batch",
        "data.train",
        "data.val",
        "image_size",
    ]


def test_labels_are_in_the_configuration_under_their_names():
    config = tiny_config()
    Nlvr2().configure(config)
    assert (config.num_labels, config.id2label) == (2, {0: "False", 1: "True"})
