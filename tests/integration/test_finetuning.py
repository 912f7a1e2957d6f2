"""Fine-tuning programs: another resolution, an early end that lasts, a file a split, evaluation alone of the best."""

import json

import pytest

from tests.data.conftest import coco  # noqa: F401  (fixture)
from tests.finetune.conftest import nlvr2, pretrained, snli_ve, tokenizer  # noqa: F401  (fixtures)
from tests.finetune.formats import nlvr2_metrics, read_lines, snli_ve_metrics
from unimo3.checkpoint import store
from unimo3.model.downstream import Unimo3ForImageTextClassification
from unimo3.training.metrics import read_metrics

pytestmark = pytest.mark.integration

IMAGE_SIZE = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("finetuning")
    (made / "fp32.json").write_text(
        '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100000}}'
    )
    return made


@pytest.fixture(scope="module")
def common(folder, pretrained):  # noqa: F811
    return (
        "--run.dir",
        folder / "runs",
        "--data.tokenizer",
        pretrained,
        "--data.max_text_tokens",
        12,
        "--data.num_workers",
        0,
        "--training.global_batch",
        4,
        "--training.micro_batch",
        2,
        "--training.ds_config",
        folder / "fp32.json",
    )


@pytest.fixture(scope="module")
def tuned(program, common, folder, pretrained, snli_ve):  # noqa: F811
    """A run that gets no better, at a rate that changes no answer: two evaluations after the first it ends."""
    command = (
        "finetune.snli_ve",
        *common,
        "--run.name",
        "tuned",
        "--init",
        pretrained,
        "--image_size",
        IMAGE_SIZE,
        "--data.train",
        snli_ve / "train",
        "--optim.lr",
        1e-12,
        "--optim.freeze",
        "[text_tower: 1, vision_tower]",
        "--optim.tower_layer_decay",
        0.5,
        "--training.steps",
        8,
        "--training.eval_every",
        1,
        "--best.patience",
        2,
        "--checkpoint.keep_last",
        1,
    )
    program.check(2, *command, "--data.val", snli_ve / "val")
    return command, folder / "runs" / "tuned"


def test_a_run_without_improvement_ends_early_and_its_best_stays(tuned):
    _, run = tuned
    assert [record["step"] for record in read_metrics(run)] == [1, 2, 3]
    assert [record["step"] for record in read_metrics(run, group="eval")] == [1, 2, 3]
    best = json.loads((run / "best.json").read_text())
    assert (best["tag"], best["metric"]) == ("step_00000001", "accuracy_overall")
    assert [path.name for path in store.list_checkpoints(run)] == ["step_00000001", "step_00000003"]


def test_metrics_are_those_of_the_prediction_file(tuned, snli_ve):  # noqa: F811
    _, run = tuned
    examples = read_lines(snli_ve.parent / "source" / "snli_ve_dev.jsonl")
    metrics = snli_ve_metrics((run / "predictions.jsonl").read_text(), examples)
    assert json.loads((run / "accuracy.json").read_text()) == pytest.approx(metrics)
    assert read_metrics(run, group="eval")[-1]["accuracy_overall"] == pytest.approx(metrics["overall"])


def test_another_split_gets_another_file_and_no_further_step(program, tuned, snli_ve):  # noqa: F811
    command, run = tuned
    before = (run / "predictions.jsonl").read_text(), (run / "best.json").read_text()
    # On another number of ranks, too.
    program.check(0, *command, "--data.val", snli_ve / "test")
    assert len(read_metrics(run)) == 3
    examples = read_lines(snli_ve.parent / "source" / "snli_ve_test.jsonl")
    snli_ve_metrics((run / "predictions_test.jsonl").read_text(), examples)
    assert ((run / "predictions.jsonl").read_text(), (run / "best.json").read_text()) == before


def test_the_best_export_answers_alone_as_the_run_did(
    program,
    tuned,
    common,
    folder,
    snli_ve,  # noqa: F811
):
    _, run = tuned
    weights = folder / "best"
    program.check(0, "pretrain.export", run, "--out", weights, "--dtype", "fp32", "--tag", "best")
    model = Unimo3ForImageTextClassification.from_pretrained(weights)
    assert model.config.vision_config.image_size == IMAGE_SIZE
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert json.loads((weights / "export_report.json").read_text())["checkpoint"] == "step_00000001"
    program.check(
        0,
        "finetune.snli_ve",
        *common,
        "--run.name",
        "alone",
        "--init",
        weights,
        "--eval-only",
        "true",
        "--data.val",
        snli_ve / "val",
    )
    alone = folder / "runs" / "alone"
    assert (alone / "predictions.jsonl").read_text() == (run / "predictions.jsonl").read_text()
    assert read_metrics(alone) == []
    assert store.list_checkpoints(alone) == []
    assert not (alone / "best.json").exists()


def test_nlvr2_trains_on_pairs_of_images(program, common, folder, pretrained, nlvr2):  # noqa: F811
    program.check(
        0,
        "finetune.nlvr2",
        *common,
        "--run.name",
        "pairs",
        "--init",
        pretrained,
        "--training.steps",
        2,
        "--data.train",
        nlvr2 / "train",
        "--data.val",
        nlvr2 / "val",
        "--optim.lr",
        1e-3,
    )
    run = folder / "runs" / "pairs"
    first, second = read_metrics(run)
    assert first["loss"] != second["loss"]
    assert {"gates_text", "gates_image"} <= set(first)
    examples = read_lines(nlvr2.parent / "source" / "dev.json")
    metrics = nlvr2_metrics((run / "predictions.csv").read_text(), examples)
    assert json.loads((run / "accuracy.json").read_text()) == pytest.approx(metrics)
