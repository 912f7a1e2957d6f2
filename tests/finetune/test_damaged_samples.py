"""Damaged samples in pretraining and each task: used rightly, counted as bad, or one error; never lost."""

import io
import json
import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.nlvr2 import Nlvr2
from finetune.retrieval import Retrieval
from finetune.snli_ve import SnliVe
from finetune.task import HeldOut, Reading
from finetune.vqa import Vqa
from tests.data.conftest import draw_jpeg, index_again, write_tar
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.args import DataArgs
from unimo3.data.captioned import CaptionedImages
from unimo3.data.index import ShardIndex
from unimo3.data.loader import ReaderArgs, TrainingLoader, evaluation_batches
from unimo3.data.order import SampleOrder
from unimo3.data.samples import PretrainSamples, TextEncoder
from unimo3.data.transforms import ImageTransform
from unimo3.distributed import World
from unimo3.errors import EXIT_CONFIG, DataError
from unimo3.training.evaluation import Unguarded
from unimo3.training.retrieval.args import RankingArgs

READER = ReaderArgs(0, 1)
NUM_GOOD = 4
GOOD = draw_jpeg(0, 8, 8)
JUNK = [None, True, 0, 2**70, 1.5, float("nan"), "", " ", "\ud83d", "\ufeffa", "\0", "a " * 99, [], [[]], [None], {}]


def saved(mode, kind):
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, kind)
    return file.getvalue()


# None: the member is missing.
PICTURES = st.sampled_from(
    [GOOD] * 8
    + [GOOD[:200], b"", b"<html>not found</html>", None, saved("CMYK", "JPEG"), saved("P", "GIF")]
    + [saved(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
)


def pretraining_content(number):
    return {"image_id": number, "captions": [f"dog {number}", f"cat {number}"], "caption": "a dog"}


def vqa_content(number):
    asked = {"question": f"is it {number}?", "answers": ["yes", "no"], "answer_type": "other", "granularity": "fine"}
    questions = [asked | {"question_id": 10 * number + item} for item in range(2)]
    return {"image_id": number, "captions": ["a dog"], "questions": questions}


def snli_ve_content(number):
    hypotheses = [{"pair_id": f"{number}#{item}", "text": f"dog {item}", "label": "neutral"} for item in range(2)]
    return {"image_id": number, "hypotheses": hypotheses, "captions": ["a dog"] * 3}


def nlvr2_content(number):
    return {"image_id": number, "identifier": f"dev-{number}-0-0", "statement": "both show dogs", "label": True}


def paths(content, start=()):
    """All paths of keys and numbers in a content."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path for key, value in inner for path in [(*start, key), *paths(value, (*start, key))]]


@st.composite
def damaged(draw, content):
    """A json member: a content with up to two changes, in some encoding, perhaps cut off."""
    content = deepcopy(content)
    for _ in range(draw(st.integers(0, 2))):
        if not content:
            break
        *parents, last = draw(st.sampled_from(paths(content)))
        parent = content
        for step in parents:
            parent = parent[step]
        match draw(st.sampled_from(["delete", "repeat", "wrap", "junk", "junk"])):
            case "delete":
                del parent[last]
            case "repeat" if isinstance(parent, list):
                parent.append(deepcopy(parent[last]))
            case "wrap":
                parent[last] = [parent[last]]
            case _:
                parent[last] = deepcopy(draw(st.sampled_from(JUNK)))
    encoding = draw(st.sampled_from(["utf-8"] * 4 + ["utf-8-sig", "utf-16", "utf-32"]))
    data = json.dumps(content).encode(encoding)
    half = data[: len(data) // 2]
    return draw(st.sampled_from([data] * 6 + [half, data + b"]", b"", b"[" * 50_000, b"[1]", b"\xff"]))


def num_units(kind, data):
    """Units of reading of a json member: entries of the list, or one that is a bad sample."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return 1
    if not isinstance(content, dict) or kind is None:
        return 1
    entries = content.get(kind)
    return len(entries) if isinstance(entries, list) else int(entries is not None)


class Guess:
    """An engine whose model always answers the same."""

    device = torch.device("cpu")

    def __init__(self, num_classes):
        self._num_classes = num_classes

    def eval(self):
        pass

    def __call__(self, batch):
        return {"logits": torch.zeros(len(batch["pixel_values"]), self._num_classes)}


def write(folder, content_of, images, position, member, picture):
    """Two tars: four good samples, and one of a json member and a picture for each of its images."""
    samples = [dict.fromkeys(images, GOOD) | {"json": json.dumps(content_of(n)).encode()} for n in range(NUM_GOOD)]
    damaged_images = {} if picture is None else dict.fromkeys(images, picture)
    samples.insert(position, damaged_images | {"json": member})
    named = [(str(number), members) for number, members in enumerate(samples)]
    for number, part in enumerate((named[:2], named[2:])):
        write_tar(folder / f"{number}.tar", part)
    index_again(folder)
    return ShardIndex(folder)


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
        index = write(Path(folder), content_of, images, position, member, picture)
        reading = Reading(tokenizer, 12, ImageTransform(8), 0)
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
        index = write(Path(folder), pretraining_content, ["jpg"], position, member, picture)
        assert DataArgs(train=folder).shard_errors("captions") == []
        reading = Reading(tokenizer, 12, ImageTransform(8), 0)
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
