"""Statements about one image or two: inputs, what identifies them, and samples that cannot be used."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.data.conftest import draw_jpeg, index_again
from tests.finetune.conftest import nlvr2, snli_ve  # noqa: F401  (fixtures)
from tests.tiny import tiny_config
from unimo3.data.index import ShardIndex
from unimo3.data.loader import ReaderArgs, TrainingLoader, evaluation_batches
from unimo3.data.order import SampleOrder, Unit
from unimo3.data.samples import BadSampleError
from unimo3.data.statements import EntailmentSamples, ImagePairSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform, normalize
from unimo3.model.downstream import Unimo3ForImagesAndTextClassification, Unimo3ForImageTextClassification
from unimo3.model.initialization import initialize_weights
from unimo3.objectives.classification import ClassificationLoss
from unimo3.training.evaluation import to_device

READER = ReaderArgs(num_workers=0, prefetch=1)


@pytest.fixture(scope="module")
def tokenizer(coco):
    return load_tokenizer(str(coco / "tokenizer"))


def samples_of(kind, folder, tokenizer):
    return kind(ShardIndex(folder), tokenizer, 12, ImageTransform(16), 0)


def test_both_images_of_a_pair_come_in_their_order(nlvr2, tokenizer):  # noqa: F811
    samples = samples_of(ImagePairSamples, nlvr2 / "val", tokenizer)
    inputs = samples.build(Unit(0, 0, 1))
    expected = [ImageTransform(16)(draw_jpeg(10 + side), np.random.default_rng(0)) for side in range(2)]
    assert np.array_equal(inputs["images"](), np.stack(expected))
    assert (inputs["identifier"], inputs["label"].item()) == ("dev-0-1-0", 0)
    assert tokenizer.decode(inputs["input_ids"], skip_special_tokens=True).strip() == "1 dogs"
    assert samples.key(Unit(0, 0, 1)) == "dev-0-1-0"


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 1])
def test_pairs_come_in_batches_of_five_axes(nlvr2, tokenizer, workers):  # noqa: F811
    samples = samples_of(ImagePairSamples, nlvr2 / "val", tokenizer)
    batch, counts = next(evaluation_batches(samples, 0, 1, 4, ReaderArgs(workers, 1)))
    assert batch["images"].shape == (4, 2, 16, 16, 3)
    assert normalize(batch["images"]).shape == (4, 2, 3, 16, 16)
    assert batch["label"].tolist() == [1, 0, 0, 1]
    assert counts.all()


def test_each_hypothesis_of_a_photo_is_a_unit(snli_ve, tokenizer):  # noqa: F811
    samples = samples_of(EntailmentSamples, snli_ve / "val", tokenizer)
    seen = {}
    for batch, counts in evaluation_batches(samples, 0, 1, 4, READER):
        for pair_id, label, counted in zip(batch["pair_id"], batch["label"].tolist(), counts.tolist(), strict=True):
            if counted:
                assert pair_id not in seen
                seen[pair_id] = label
    assert seen == {f"{100 + number // 3}.jpg#{number}r1e": number % 3 for number in range(11)}
    assert samples.key(Unit(0, 0, 4)) == "000000000101#1"


def rewrite(folder, out, change):
    """Shards of one tar with what `change` makes of each json."""
    out.mkdir()
    with tarfile.open(sorted(folder.glob("*.tar"))[0]) as tar, tarfile.open(out / "000000.tar", "w") as written:
        for member in tar:
            content = tar.extractfile(member).read()
            if member.name.endswith(".json"):
                content = json.dumps(change(json.loads(content))).encode()
            info = tarfile.TarInfo(member.name)
            info.size = len(content)
            written.addfile(info, io.BytesIO(content))
    index_again(out)
    return out


@pytest.mark.parametrize(
    "change", [{"label": "True"}, {"label": None}, {"statement": " "}, {"identifier": "dev-0-0,1-0"}]
)
def test_a_statement_that_cannot_be_used_is_an_error_with_the_reason(nlvr2, tokenizer, tmp_path, change):  # noqa: F811
    folder = rewrite(nlvr2 / "val", tmp_path / "val", lambda content: content | change)
    with pytest.raises(BadSampleError, match="its json lacks a field, or has a label that is not true or false"):
        samples_of(ImagePairSamples, folder, tokenizer).build(Unit(0, 0, 0))


@pytest.mark.parametrize("change", [{"label": "-"}, {"text": ""}, {"pair_id": 7}])
def test_a_hypothesis_that_cannot_be_used_is_an_error_with_the_reason(snli_ve, tokenizer, tmp_path, change):  # noqa: F811
    def changed(content):
        return content | {"hypotheses": [hypothesis | change for hypothesis in content["hypotheses"]]}

    folder = rewrite(snli_ve / "val", tmp_path / "val", changed)
    with pytest.raises(BadSampleError, match="hypothesis 0 of its json lacks a field, or has a label other than"):
        samples_of(EntailmentSamples, folder, tokenizer).build(Unit(0, 0, 0))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("kind", "model_class", "num_labels"),
    [
        (ImagePairSamples, Unimo3ForImagesAndTextClassification, 2),
        (EntailmentSamples, Unimo3ForImageTextClassification, 3),
    ],
    ids=["nlvr2", "snli_ve"],
)
def test_a_training_batch_gives_loss_accuracy_and_gradients(request, tokenizer, kind, model_class, num_labels):
    shards = request.getfixturevalue("nlvr2" if kind is ImagePairSamples else "snli_ve")
    samples = samples_of(kind, shards / "train", tokenizer)
    (loaded,) = next(iter(TrainingLoader([samples], SampleOrder(samples.units_per_shard, 0, 1), 6, 6, 0, 1, READER)))
    text = tiny_config().text_config.to_dict() | {"vocab_size": 400}
    model = model_class(tiny_config(text_config=text, num_labels=num_labels))
    initialize_weights(model, 0, std=0.2)
    task = ClassificationLoss(model)
    batch = to_device(loaded, torch.device("cpu"))
    report = task(batch)
    assert set(report) == {"loss", "accuracy", "gates_text", "gates_image"}
    # [gated layers, heads, levels], of both images where there are two.
    for gates in (report["gates_text"], report["gates_image"]):
        torch.testing.assert_close(gates.sum(dim=-1), torch.ones(gates.shape[:2]))
    report["loss"].backward()
    assert all(parameter.grad.abs().max() > 0 for name, parameter in model.named_parameters() if "_head" in name)
    evaluated = task.eval()(batch)
    logits = evaluated["logits"]
    assert logits.shape == (6, num_labels)
    assert evaluated["loss"].item() == pytest.approx(cross_entropy(logits, loaded["label"]).item())
    right = [row.argmax().item() == label for row, label in zip(logits, loaded["label"].tolist(), strict=True)]
    assert evaluated["accuracy"].item() == pytest.approx(sum(right) / 6)
