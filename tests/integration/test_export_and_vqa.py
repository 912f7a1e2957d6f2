"""Exported weights are the engine's; VQA fine-tuning starts from them and scores every question once."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from tests.spawn import run_ranks
from unimo3.checkpoint.load import load, newest_good
from unimo3.checkpoint.state import TrainState
from unimo3.data.answers import AnswerVocabulary
from unimo3.model.downstream import Unimo3ForVisualQuestionAnswering
from unimo3.model.unimo3 import Unimo3ForPreTraining, Unimo3Model
from unimo3.training.metrics import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("commands")]


def gathered_weights_and_outputs(run, recipe):
    """On each rank: load the run's newest checkpoint into an engine, gather its weights, compute on a fixed batch."""
    import deepspeed

    from pretrain.train import PretrainConfig
    from unimo3 import config
    from unimo3.objectives.base import PretrainingLoss
    from unimo3.training.ds_config import read_ds_config
    from unimo3.training.engine import build_engine, build_model

    settings = config.parse(PretrainConfig, ["--config", recipe], "", "")
    ds_config = read_ds_config(settings.training.ds_config, settings.batch_plan(2), settings.optim.clip_norm)
    model = build_model(ds_config, lambda: Unimo3ForPreTraining(settings.model.to_config()))
    engine = build_engine(PretrainingLoss(model, settings.objectives.build(0)), model, ds_config, settings.optim)
    load(engine, newest_good(run))
    engine.eval()
    with torch.no_grad():
        out = model(*fixed_batch(torch.bfloat16))
    masters = {}
    for name, parameter in model.named_parameters():
        masters[name] = deepspeed.utils.safe_get_full_fp32_param(parameter)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return weights, masters, out.matching_logits.float(), out.prediction_logits.float()


def fixed_batch(dtype):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return ids, torch.randn(2, 3, 32, 32, generator=generator).to(dtype), mask


@pytest.fixture(scope="module")
def gathered(straight, recipe):
    return run_ranks(2, gathered_weights_and_outputs, straight, str(recipe))[0]


def test_exported_weights_equal_the_engines_gathered_ones(gathered, weights):
    engine_weights, masters, _, _ = gathered
    with safe_open(weights / "model.safetensors", "pt") as exported:
        names = set(exported.keys())
        assert names == set(masters)
        for name in names:
            tensor = exported.get_tensor(name)
            assert torch.equal(tensor, masters[name]), name
            assert torch.equal(tensor.bfloat16(), engine_weights[name]), name


def test_fp16_export_loads_and_gives_the_engines_outputs(program, straight, recipe, gathered):
    out = recipe.parent / "fp16"
    program.check(0, "pretrain.export", straight, "--out", out, "--dtype", "fp16", "--max-shard-size", "60KB")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert not [path for path in out.iterdir() if path.suffix in (".pt", ".bin", ".pkl")]
    model = Unimo3ForPreTraining.from_pretrained(out)
    assert model.dtype == torch.float16
    output = model.float().eval()(*fixed_batch(torch.float32))
    _, _, matching, prediction = gathered
    # The engine computes in bf16: 8 bits of mantissa against float32 here.
    torch.testing.assert_close(output.matching_logits, matching, atol=0.02, rtol=0.02)
    torch.testing.assert_close(output.prediction_logits, prediction, atol=0.05, rtol=0.05)
    report = json.loads((out / "export_report.json").read_text())
    assert_card(out, straight)
    assert {entry["dtype"] for entry in report["tensors"]} == {"float16"}
    assert isinstance(AutoModel.from_pretrained(out), Unimo3Model)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.mask_token, tokenizer.model_max_length) == ("<mask>", 16)
    assert AutoImageProcessor.from_pretrained(out).size == {"height": 32, "width": 32}


def assert_card(out, run):
    """The model card has what the run's own files have."""
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "unimo3"
    assert card.data.license is None  # left to the user
    state = TrainState.read(run / "checkpoints" / "step_00000020" / "state.json")
    (source,) = state.extra["data"]
    assert (source["dataset"], source["split"], source["weight"]) == ("coco", "train", 1.0)
    assert source["fingerprint"] == state.index_fingerprint
    (evaluation,) = [record for record in read_metrics(run, group="eval") if record["step"] == 20]
    for line in (
        "from unimo3.model.unimo3 import Unimo3ForPreTraining",
        "| optimizer steps | 20 of 20 |",
        f"| coco | train | {source['samples']} | 1.0 | {state.index_fingerprint} |",
        f"| 20 | held-out | `{evaluation['data'][:12]}` | `loss` | {evaluation['loss']:.4f} |",
        "| type asked for | fp16 |",
        "- Texts are cut after 16 tokens.",
    ):
        assert line in card.text.splitlines(), card.text
    # Nothing that reads the folder takes the card for something else, and an export without one is as good.
    (out / "README.md").unlink()
    assert Unimo3ForPreTraining.from_pretrained(out).dtype == torch.float16


def test_a_base_model_from_the_export_equals_the_exported_one(weights):
    base = Unimo3Model.from_pretrained(weights).eval()
    complete = Unimo3ForPreTraining.from_pretrained(weights).eval()
    batch = fixed_batch(torch.float32)
    assert torch.equal(base(*batch).pooler_output, complete.unimo3(*batch).pooler_output)


def test_an_existing_folder_or_a_missing_checkpoint_is_refused(program, straight, weights, tmp_path):
    assert program.run(0, "pretrain.export", straight, "--out", weights) == 78
    assert f"--out {weights}: exists" in program.output
    assert program.run(0, "pretrain.export", straight, "--out", tmp_path / "x", "--tag", "step_00000099") == 78
    assert "there are: step_00000018, step_00000020" in program.output
    assert program.run(0, "pretrain.export", tmp_path, "--out", tmp_path / "x") == 78
    assert "has no good checkpoint" in program.output
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def vqa_run(program, weights, vqav2, recipe, runs):
    status = program.run(
        2,
        "finetune.vqa",
        "--init",
        weights,
        "--run.dir",
        runs,
        "--run.name",
        "vqa",
        "--data.train",
        vqav2 / "train",
        "--data.val",
        vqav2 / "val",
        "--data.tokenizer",
        weights,
        "--data.max_text_tokens",
        "12",
        "--data.num_workers",
        "1",
        "--optim.lr",
        "1e-3",
        "--training.steps",
        "6",
        "--training.global_batch",
        "8",
        "--training.micro_batch",
        "4",
        "--training.eval_every",
        "3",
        "--training.ds_config",
        recipe.parent / "fp32.json",
    )
    assert status == 0, program.output[-4000:]
    return runs / "vqa"


def test_vqa_answers_every_question_once_in_the_official_format(vqa_run, source):
    asked = json.loads((source / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    answered = json.loads((vqa_run / "predictions.json").read_text())
    assert sorted(entry["question_id"] for entry in answered) == sorted(q["question_id"] for q in asked)
    assert all(set(entry) == {"question_id", "answer"} and isinstance(entry["answer"], str) for entry in answered)


def test_vqa_accuracy_is_the_predictions_official_accuracy(vqa_run, source):
    notes = json.loads((source / "v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    humans = {note["question_id"]: [entry["answer"] for entry in note["answers"]] for note in notes}
    scores = []
    for entry in json.loads((vqa_run / "predictions.json").read_text()):
        # Every question here has nine equal answers and "no": three or more others agree, or none, or at most one.
        prediction = entry["answer"].replace("dog", "a dog")
        people = humans[entry["question_id"]]
        others = [people[:omitted] + people[omitted + 1 :] for omitted in range(10)]
        scores.append(sum(min(1, other.count(prediction) / 3) for other in others) / 10)
    accuracy = json.loads((vqa_run / "accuracy.json").read_text())
    assert accuracy["overall"] == pytest.approx(sum(scores) / len(scores))
    assert len(read_metrics(vqa_run)[0]["gates_text"][0]) == 2  # heads
    evaluations = read_metrics(vqa_run, group="eval")
    assert [record["step"] for record in evaluations] == [3, 6]
    assert evaluations[-1]["accuracy_overall"] == pytest.approx(accuracy["overall"])


def test_a_run_continues_from_its_saved_model_and_answers(program, vqa_run, vqav2, recipe, runs, tmp_path):
    """Its first weights are gone, and the shards' vocabulary is in another order by now."""
    shutil.copytree(vqav2, tmp_path / "shards")
    answers = AnswerVocabulary.load(vqav2 / "answers.json").answers
    AnswerVocabulary(answers[::-1]).save(tmp_path / "shards" / "answers.json")
    command = (
        1,
        "finetune.vqa",
        "--run.dir",
        runs,
        "--run.name",
        "vqa",
        "--init",
        tmp_path / "gone",
        "--data.train",
        tmp_path / "shards" / "train",
        "--data.val",
        vqav2 / "val",
        "--data.tokenizer",
        vqa_run / "model",
        "--data.max_text_tokens",
        "12",
        "--data.num_workers",
        "1",
        "--optim.lr",
        "1e-3",
        "--training.steps",
        "6",
        "--training.global_batch",
        "8",
        "--training.micro_batch",
        "4",
        "--training.ds_config",
        recipe.parent / "fp32.json",
    )
    before = json.loads((vqa_run / "predictions.json").read_text())
    steps = read_metrics(vqa_run)
    program.check(*command, "--eval-only", "true")
    assert json.loads((vqa_run / "predictions.json").read_text()) == before
    assert [record["step"] for record in read_metrics(vqa_run, group="eval")] == [3, 6, 6]
    assert read_metrics(vqa_run) == steps
    assert program.run(*command, "--answers", tmp_path / "shards" / "answers.json") == 78
    assert "this run was started with ''; keep that, or choose a new run.name" in program.output


def test_vqa_weights_export_with_their_head_and_vocabulary(program, vqa_run, recipe):
    out = recipe.parent / "vqa_weights"
    program.check(0, "pretrain.export", vqa_run, "--out", out)
    model = Unimo3ForVisualQuestionAnswering.from_pretrained(out)
    assert model.vqa_head.classifier.out_features == len(json.loads((out / "answers.json").read_text())["answers"])


def test_vqa_without_weights_is_refused_with_the_fix(program, vqav2, tmp_path):
    status = program.run(
        1,
        "finetune.vqa",
        "--init",
        tmp_path,
        "--data.train",
        vqav2 / "train",
        "--data.tokenizer",
        tmp_path,
        "--training.global_batch",
        "8",
        "--training.micro_batch",
        "8",
    )
    assert status == 78
    # What the model decides is looked at once the settings are right.
    assert "ConfigError: Invalid configuration (1 error)" in program.output
    assert "name a folder that python -m pretrain.export wrote" in program.output


def test_vqa_starts_from_a_run_as_from_its_export(program, straight, vqa_run, vqav2, recipe, runs):
    status = program.run(
        2,
        "finetune.vqa",
        "--init",
        straight,
        "--run.dir",
        runs,
        "--run.name",
        "vqa_of_a_run",
        "--data.train",
        vqav2 / "train",
        "--data.tokenizer",
        straight / "model",
        "--data.max_text_tokens",
        "12",
        "--data.num_workers",
        "1",
        "--optim.lr",
        "1e-3",
        "--training.steps",
        "6",
        "--training.stop_after",
        "1",
        "--training.global_batch",
        "8",
        "--training.micro_batch",
        "4",
        "--training.ds_config",
        recipe.parent / "fp32.json",
    )
    assert status == 0, program.output[-4000:]
    assert read_metrics(runs / "vqa_of_a_run")[0]["loss"] == read_metrics(vqa_run)[0]["loss"]
    assert (runs / "vqa_of_a_run" / "init" / "model.safetensors").is_file()
