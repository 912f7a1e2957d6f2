"""Pretraining from an S3 bucket as users start it: the same samples and losses as from folders, and no credentials."""

import json

import pytest

from tests.data.test_object_store import EXPIRED, THROTTLED, upload
from tests.integration.conftest import TWO_MICRO_STEPS, losses
from tests.s3 import s3, s3_server  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("commands")]


def samples_of(run, rank):
    """What a rank read at each step, without its source."""
    lines = (run / "ledger" / f"rank_{rank:05d}.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    return {record["step"]: [sample[1:] for sample in record["samples"]] for record in records}


def test_two_ranks_train_from_a_bucket_until_credentials_expire(s3, program, recipe, runs, straight, coco, tmp_path):  # noqa: F811
    train, val = upload(s3, coco / "train", "coco/train"), upload(s3, coco / "val", "coco/val")
    s3.instead["GET", "coco/train/index.members"] = [THROTTLED]
    command = ("pretrain.train", "--config", recipe, "--run.name", "bucket", "--data.train", train, "--data.val", val)
    command += TWO_MICRO_STEPS
    cached = ("--data.cache_dir", tmp_path / "cache")
    program.check(2, *command, *cached, "--training.stop_after", "6")
    run = runs / "bucket"
    assert losses(run) == losses(straight)[:6]
    for rank in range(2):
        expected = samples_of(straight, rank)
        assert samples_of(run, rank) == {step: expected[step] for step in range(1, 7)}
    for path in (path for path in run.rglob("*") if path.is_file()):
        assert b"test-secret" not in path.read_bytes(), path
    assert "test-secret" not in program.output

    # Of an empty cache; the index is read and the shards are not.
    s3.instead["GET", "coco/train/index.members"] = [lambda: setattr(s3, "always", EXPIRED)]
    assert program.run(2, *command, "--data.cache_dir", tmp_path / "other") == 78
    assert "the credentials expired (ExpiredToken as a sentence); renew them (AWS_PROFILE" in program.output
    assert "Traceback" not in program.output
