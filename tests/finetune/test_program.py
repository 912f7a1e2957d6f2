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
import torch
from safetensors.torch import load_file, save_file

from benchmarks.scale_data import write_version_3
from finetune.nlvr2 import Nlvr2, Nlvr2Config
from finetune.nlvr2 import main as nlvr2_main
from finetune.retrieval import RetrievalConfig
from finetune.snli_ve import SnliVeConfig
from finetune.vqa import VqaConfig
from tests.data.conftest import draw_jpeg, index_again, write_tar
from tests.data.test_tokenizer import write_tokenizer
from tests.tiny import tiny_config
from tests.waiting import text_of, wait_for
from unimo3 import config
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.args import DataArgs
from unimo3.data.tokenizer import load_tokenizer
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


@pytest.mark.parametrize("split", ["test", "test-dev", "Test", "TEST"])
def test_nothing_is_trained_on_a_test_split(nlvr2, pretrained, tmp_path, split):
    shutil.copytree(nlvr2 / "test", tmp_path / split)
    index = tmp_path / split / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"split": split}))
    (problem,) = settings(Nlvr2Config, nlvr2, pretrained, tmp_path, {"train": str(tmp_path / split)}).validate()
    assert problem.startswith(
        f"data.train: '{tmp_path / split}': is the split {split} of nlvr2, which is for evaluation only"
    )
    assert settings(Nlvr2Config, nlvr2, pretrained, tmp_path, {"val": str(tmp_path / split)}).validate() == []


def test_missing_tensors_are_named_before_anything_starts(nlvr2, pretrained, tmp_path, capsys):
    shutil.copytree(pretrained, tmp_path / "weights")
    tensors = load_file(pretrained / "model.safetensors")
    missing = [name for name in tensors if name.endswith("layers.1.feed_forward.outer.bias")]
    others = {name: tensor for name, tensor in tensors.items() if name not in missing}
    save_file(others | {"surprise": torch.zeros(1)}, tmp_path / "weights" / "model.safetensors", {"format": "pt"})
    wanted = settings(Nlvr2Config, nlvr2, tmp_path / "weights", tmp_path)
    config.save(wanted, tmp_path / "config.yaml")
    with pytest.raises(SystemExit) as end:
        nlvr2_main(["--config", str(tmp_path / "config.yaml")])
    assert end.value.code == 78
    error = capsys.readouterr().err
    assert f"init: '{tmp_path / 'weights'}': its tensors do not fit Unimo3ForImagesAndTextClassification" in error
    assert f"missing: {', '.join(missing)}; unexpected: surprise. Use weights of the same" in error
    assert not torch.distributed.is_initialized()
    assert not (tmp_path / "runs").exists()


WRONG_ANSWERS = {
    "one answer instead of a list": lambda question: {"question": question["question"], "answer": "dog"},
    "no answers": lambda question: {"question": question["question"]},
    "answers of another vocabulary": lambda question: question | {"answers": ["zebra"] * 10},
    "null": lambda question: question | {"answers": None},
}


@pytest.mark.parametrize("what", WRONG_ANSWERS)
def test_questions_without_an_answer_of_the_vocabulary_are_not_trained_on(vqav2, pretrained, tmp_path, what):
    samples = {}
    for number in range(4):
        asked = {"question": "is it?", "question_id": number, "answers": ["yes"] * 10}
        content = {"image_id": number, "questions": [WRONG_ANSWERS[what](asked)]}
        samples[str(number)] = {"jpg": draw_jpeg(number, 8, 8), "json": json.dumps(content).encode()}
    (tmp_path / "shards" / "train").mkdir(parents=True)
    write_tar(tmp_path / "shards" / "train" / "0.tar", samples)
    index_again(tmp_path / "shards" / "train")
    shutil.copy(vqav2 / "answers.json", tmp_path / "shards" / "answers.json")
    data = {"train": str(tmp_path / "shards" / "train"), "val": None}
    (problem,) = settings(VqaConfig, vqav2, pretrained, tmp_path, data).validate()
    assert problem.startswith(f"data.train: '{data['train']}': none of 4 questions that were read has an answer of")
    # Where nothing is trained, answers are not needed.
    data = {"train": "", "val": data["train"]}
    answers = str(vqav2 / "answers.json")
    problems = settings(VqaConfig, vqav2, pretrained, tmp_path, data, answers=answers, eval_only=True).validate()
    assert not [problem for problem in problems if problem.startswith("data.")]


def test_texts_of_which_the_tokenizer_knows_nothing_are_named(pretrained, tmp_path):
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "dog": 5}
    tokenizer = write_tokenizer(tmp_path / "tokenizer", words)
    for name, caption in (("cyrillic", "собака"), ("english", "a dog")):
        shards = tmp_path / name
        shards.mkdir()
        write_tar(shards / "0.tar", {"a": {"jpg": draw_jpeg(0, 8, 8), "txt": caption.encode()}})
        index_again(shards)
    known = load_tokenizer(tokenizer)
    (problem,) = DataArgs(str(tmp_path / "cyrillic"), tokenizer=tokenizer).text_errors(known, "captions")
    assert problem.startswith(f"data.tokenizer: '{tokenizer}': knows no part of the 1 captions that were read from")
    assert "data.train, such as 'собака'" in problem
    assert DataArgs(str(tmp_path / "english"), tokenizer=tokenizer).text_errors(known, "captions") == []
    write_tar(tmp_path / "english" / "0.tar", {"a": {"jpg": b"", "json": b'{"caption": "dog \\ud83d"}'}})
    index_again(tmp_path / "english")
    assert DataArgs(str(tmp_path / "english"), tokenizer=tokenizer).text_errors(known, "captions") == []
    mixed = DataArgs(str(tmp_path / "english"), val=str(tmp_path / "cyrillic"), tokenizer=tokenizer)
    assert "data.val" in mixed.text_errors(known, "captions")[0]
    assert mixed.text_errors(known, "questions") == []


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
    write_version_3(tmp_path / "val")
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

    def errors_after(age_s=0, **changes):
        beat = Heartbeat(0, socket.gethostname(), process.pid, 7, "compute", 9, time.time(), time.time())
        path = folder / "heartbeats" / "rank_00000.json"
        path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(beat, **changes))))
        os.utime(path, (time.time() - age_s,) * 2)
        errors = settings(Nlvr2Config, nlvr2, pretrained, tmp_path, {"train": ""}, eval_only=True).validate()
        return [problem for problem in errors if "is in use" in problem]

    (problem,) = errors_after()
    assert problem.startswith(f"eval_only: true: {folder} is in use, rank 0 is at step 7 (pid {process.pid} on ")
    assert errors_after(host="another")
    assert errors_after(host="another", time=time.time() - 3600)  # its clock is behind
    assert not errors_after(host="another", age_s=60, time=time.time() + 3600)
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
    assert problem.startswith("training.micro_batch: 1: ITC and ITM draw negatives from one micro-step")


def test_all_errors_are_reported_those_of_the_model_after_others(nlvr2, tuned_vqa, tmp_path):
    def fields(*groups):
        errors = settings(Nlvr2Config, nlvr2, tuned_vqa, tmp_path, *groups, image_size=30).validate()
        return [problem.partition(":")[0] for problem in errors]

    data = {"train": str(nlvr2 / "test"), "val": "nowhere"}
    assert fields(data, {"micro_batch": 3}) == ["training.global_batch", "data.train", "data.val"]
    assert fields() == ["init", "image_size"]


def test_labels_are_in_the_configuration_under_their_names():
    config = tiny_config()
    Nlvr2().configure(config)
    assert (config.num_labels, config.id2label) == (2, {0: "False", 1: "True"})
