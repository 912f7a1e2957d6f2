"""A run's export is the trained model: the same logits, by its own class and by transformers' Auto classes."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForVisualQuestionAnswering, AutoProcessor

from finetune.tasks import TASKS, config_class
from tests.finetune.tuning import fixed_batch
from unimo3.model.downstream import Unimo3ForVisualQuestionAnswering
from unimo3.model.processor import Unimo3Processor
from unimo3.model.unimo3 import Unimo3Model

pytestmark = pytest.mark.xdist_group("finetune")


@pytest.mark.parametrize("name", TASKS)
def test_exported_weights_give_the_trained_models_logits(tuned, name):
    model, report = config_class(name).task.model_class.from_pretrained(
        tuned / f"{name}_weights", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == (torch.bfloat16 if name == "nlvr2" else torch.float32)
    with torch.no_grad():
        output = model.eval()(**fixed_batch(name, model.dtype))
    expected = load_file(tuned / f"{name}.safetensors")
    assert expected
    for kind, logits in expected.items():
        # ZeRO-3 multiplies, rounds, then adds the bias; torch's linear rounds once, which shows in bf16.
        atol = 0.05 if name == "nlvr2" else 0.0
        torch.testing.assert_close(output[kind], logits, atol=atol, rtol=0.0)


@pytest.mark.parametrize("name", TASKS)
def test_auto_classes_open_an_export(tuned, name):
    folder = tuned / f"{name}_weights"
    assert isinstance(AutoModel.from_pretrained(folder), Unimo3Model)
    assert isinstance(AutoProcessor.from_pretrained(folder), Unimo3Processor)


def test_the_auto_class_of_vqa_gives_the_trained_models_logits(tuned):
    model = AutoModelForVisualQuestionAnswering.from_pretrained(tuned / "vqa_weights").eval()
    assert isinstance(model, Unimo3ForVisualQuestionAnswering)
    with torch.no_grad():
        output = model(**fixed_batch("vqa", torch.float32))
    assert torch.equal(output.logits, load_file(tuned / "vqa.safetensors")["logits"])


def test_an_exports_processor_cuts_texts_where_the_run_did(tuned):
    processor = Unimo3Processor.from_pretrained(tuned / "vqa_weights")
    assert processor(text=["dogs " * 50], return_tensors="pt")["input_ids"].shape == (1, 12)
