"""Damaged samples in pretraining and each task: used rightly, counted as bad, or one error; never lost."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.nlvr2 import Nlvr2
from finetune.retrieval import Retrieval
from finetune.snli_ve import SnliVe
from finetune.task import HeldOut, InputSettings
from finetune.vqa import Vqa
from tests.finetune.damage import (
    NUM_GOOD,
    PICTURES,
    damaged,
    nlvr2_content,
    num_units,
    pretraining_content,
    snli_ve_content,
    vqa_content,
    write_shards,
)
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.args import DataArgs
from unimo3.data.captioned import CaptionedImages
from unimo3.data.loader import ReaderArgs, TrainingLoader, evaluation_batches
from unimo3.data.order import SampleOrder
from unimo3.data.samples import PretrainSamples, TextEncoder
from unimo3.data.transforms import ImageTransform
from unimo3.distributed import World
from unimo3.errors import EXIT_CONFIG, DataError
from unimo3.training.evaluation import Unguarded
from unimo3.training.retrieval.args import RankingArgs

READER = ReaderArgs(0, 1)


class Guess:
    """An engine whose model always answers the same."""

    device = torch.device("cpu")

    def __init__(self, num_classes):
        self._num_classes = num_classes

    def eval(self):
        pass

    def __call__(self, batch):
        return {"logits": torch.zeros(len(batch["pixel_values"]), self._num_classes)}


def texts_of(field, content):
    """The texts that a json's content may give: of an entry's field, or of captions and caption."""
    if field is None:
        captions = content["captions"] if isinstance(content.get("captions"), list) else [content.get("captions")]
        texts = [*captions, content.get("caption")]
    else:
        texts = [content[field]]
    return {text.lstrip("\ufeff") for text in texts if isinstance(text, str)}


@pytest.fixture(scope="module")
def encode(tokenizer):
    return TextEncoder(tokenizer, 12)


def num_replaced(samples, position, encode, field, contents):
    """Read each unit once in training: it is there with its text, or replaced and counted.

    Args:
        position: of the only sample that may be replaced.
        contents: of the units of that sample.
    """
    total = sum(samples.units_per_shard)
    order = SampleOrder(samples.units_per_shard, 0, 1)
    (batch,) = next(iter(TrainingLoader([samples], order, total, total, 0, 1, READER)))
    replaced = {samples.key(order[number]) for number in range(total)} - set(batch["keys"])
    assert batch["num_replaced"] == len(replaced)
    assert {key.split("#")[0] for key in replaced} <= {str(position)}
    for key, ids in zip(batch["keys"], batch["input_ids"].tolist(), strict=True):
        sample, _, item = key.partition("#")
        if sample == str(position):
            assert ids in [encode(text)[0].tolist() for text in texts_of(field, contents()[int(item or 0)])]
    return len(replaced)


def error_of(evaluate):
    """The one error that an evaluation ends with, if it does."""
    try:
        evaluate()
    except DataError as error:
        return error
    return None


TASKS = {
    "vqa": (Vqa(AnswerVocabulary(["yes", "no"])), vqa_content, "questions", "question", ["jpg"], 2),
    "snli_ve": (SnliVe(), snli_ve_content, "hypotheses", "text", ["jpg"], 3),
    "nlvr2": (Nlvr2(), nlvr2_content, None, "statement", ["0.jpg", "1.jpg"], 2),
}
many = settings(max_examples=20, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", TASKS)
@many
@given(data=st.data(), picture=PICTURES, position=st.integers(0, NUM_GOOD))
def test_a_damaged_sample_of_a_task_is_never_lost(tokenizer, encode, name, data, picture, position):
    task, content_of, kind, field, images, num_classes = TASKS[name]
    member = data.draw(damaged(content_of(NUM_GOOD)))
    with tempfile.TemporaryDirectory() as folder:
        index = write_shards(Path(folder), content_of, images, [(position, member, picture)])
        reading = InputSettings(tokenizer, 12, ImageTransform(8), 0)
        samples = task.samples(index, reading)
        num_damaged = num_units(kind, member)
        total = sum(samples.units_per_shard)
        assert total == NUM_GOOD * (2 if kind else 1) + num_damaged
        assert DataArgs(train=folder).shard_errors(task.kind) == []
        num_bad = num_replaced(
            samples,
            position,
            encode,
            field,
            lambda: json.loads(member)[kind] if kind else [json.loads(member)],
        )
        held_out = HeldOut(index, reading, World(0, 0, 1), 4, READER)

        def evaluate():
            results = task.evaluate(Guess(num_classes), held_out, Unguarded())
            (predictions,) = (text for file, text in results.files.items() if file.startswith("predictions"))
            lines = json.loads(predictions) if name == "vqa" else predictions.splitlines()
            assert len(lines) == total

        assert (error := error_of(evaluate)) or not num_bad
        assert error is None or error.exit_status == EXIT_CONFIG


@pytest.mark.parametrize("is_retrieval", [False, True], ids=["pretraining", "retrieval"])
@many
@given(data=st.data(), picture=PICTURES, position=st.integers(0, NUM_GOOD))
def test_a_damaged_sample_of_captions_is_never_lost(tokenizer, encode, is_retrieval, data, picture, position):
    member = data.draw(damaged(pretraining_content(NUM_GOOD)))
    with tempfile.TemporaryDirectory() as folder:
        index = write_shards(Path(folder), pretraining_content, ["jpg"], [(position, member, picture)])
        assert DataArgs(train=folder).shard_errors("captions") == []
        reading = InputSettings(tokenizer, 12, ImageTransform(8), 0)
        trained = PretrainSamples(index, *reading[:3], 0.15, 0)
        if is_retrieval:
            trained = Retrieval(RankingArgs(), 0).samples(index, reading)
        num_bad = num_replaced(trained, position, encode, None, lambda: [json.loads(member)])
        held_out = CaptionedImages(index, *reading[:3]) if is_retrieval else trained

        def evaluate():
            keys = [key for batch, counts in evaluation_batches(held_out, 0, 1, 3, READER) for key in batch["keys"]]
            assert len(set(keys)) == sum(held_out.units_per_shard)

        assert (error := error_of(evaluate)) or not num_bad
        assert error is None or error.exit_status == EXIT_CONFIG
