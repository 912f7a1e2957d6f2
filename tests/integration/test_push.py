"""A run whose disk is lost continues from its copy in an S3 bucket, and fine-tuning starts from that copy."""

import pytest

from tests.checkpoint.copies import run_program
from tests.integration.conftest import TWO_MICRO_STEPS, losses
from tests.s3 import URL, s3, s3_server  # noqa: F401  (two are fixtures)
from unimo3.checkpoint import store
from unimo3.training.metrics import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("commands")]

RUN_URL = f"{URL}/runs/straight"


def test_a_run_whose_disk_is_lost_gives_the_same_losses(s3, program, recipe, straight, tmp_path):  # noqa: F811
    assert run_program("push", straight, RUN_URL, "--tag", "step_00000018") == 0
    copy = tmp_path / "runs" / "straight"
    assert run_program("pull", RUN_URL, copy) == 0
    assert [folder.name for folder in store.list_checkpoints(copy)] == ["step_00000018"]
    program.check(
        2, "pretrain.train", "--config", recipe, "--run.name", "straight", "--run.dir", copy.parent, *TWO_MICRO_STEPS
    )
    assert f"resumed from {copy}/checkpoints/step_00000018 at step 18" in program.output
    assert [record["step"] for record in read_metrics(copy)] == list(range(1, 21))
    assert losses(copy) == losses(straight)
    assert read_metrics(copy, group="eval") == read_metrics(straight, group="eval")
    for rank in range(2):
        name = f"ledger/rank_{rank:05d}.jsonl"
        assert (copy / name).read_bytes() == (straight / name).read_bytes()


def test_fine_tuning_starts_from_a_run_in_a_bucket(s3, program, recipe, straight, weights, vqav2, tmp_path):  # noqa: F811
    assert run_program("push", straight, RUN_URL, "--tag", "step_00000020") == 0
    s3.requests.clear()
    source = ("--run.dir", tmp_path, "--run.name", "vqa", "--init", RUN_URL, "--data.tokenizer", f"{RUN_URL}/model")
    batch = ("--training.steps", "1", "--training.global_batch", "8", "--training.micro_batch", "4")
    data = ("--data.train", vqav2 / "train", "--data.max_text_tokens", "12", "--data.num_workers", "0")
    program.check(2, "finetune.vqa", *source, *batch, *data, "--training.ds_config", recipe.parent / "fp32.json")
    made = tmp_path / "vqa" / "init"
    assert (made / "source.txt").read_text() == f"{RUN_URL}\nstep_00000020"
    assert (made / "model.safetensors").read_bytes() == (weights / "model.safetensors").read_bytes()
    assert not (made.parent / "init.source").exists()
    read = [request.key for request in s3.requests if request.method == "GET" and request.key.endswith(".pt")]
    assert len(read) == len(set(read)) == len(list((straight / "checkpoints" / "step_00000020").glob("*.pt")))
    assert "test-secret" not in program.output
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"test-secret" not in path.read_bytes(), path
