"""More ranks than any other test has: sixteen train and are killed, twelve continue, and the result is exported."""

import json
import os
import signal
from collections import Counter

import pytest
import yaml
from safetensors.torch import load_file

from tests.commands import start_command
from tests.integration.conftest import MODEL
from tests.waiting import text_of, wait_for, wait_for_end
from unimo3.checkpoint import store
from unimo3.training.heartbeat import read_heartbeats
from unimo3.training.metrics import read_metrics

pytestmark = pytest.mark.integration

BEFORE, AFTER = 16, 12
STEPS, EVERY = 6, 2


@pytest.fixture(scope="module")
def small_recipe(coco, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sixteen")
    (folder / "zero.json").write_text(
        '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100000}}'
    )
    towers = {name: MODEL[name] | {depth: 1} for name, depth in (("text", "num_hidden_layers"), ("vision", "depth"))}
    settings = {
        "run": {"dir": str(folder), "name": "run"},
        "model": MODEL | towers | {"num_hidden_layers": 1},
        "data": {
            "train": {str(coco / "train"): 1, str(coco / "val"): 1},
            "mix_temperature": 2.0,
            "max_epochs": 1000,
            "tokenizer": str(coco / "tokenizer"),
            "max_text_tokens": 12,
            "num_workers": 0,
            "ledger": True,
        },
        "optim": {"lr": 1e-4, "schedule": "constant", "warmup_ratio": 0.0},
        "training": {"steps": STEPS, "global_batch": 48, "micro_batch": 1, "ds_config": str(folder / "zero.json")},
        "checkpoint": {"every_steps": EVERY, "keep_last": 10},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


def test_sixteen_killed_ranks_are_continued_by_twelve_and_exported(small_recipe, program, tmp_path):
    run, log = small_recipe.parent / "run", tmp_path / "log"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    # They wait after step 5; the last checkpoint is that of step 4.
    environment |= {"INJECT": '{"until_stop": [5]}'}
    launcher = start_command(
        "unimo3.launch", ("-n", BEFORE, "tests.inject", "--config", small_recipe), environment, log
    )
    wait_for(lambda: launcher.exitcode is not None or len(read_metrics(run)) >= 4, "4 steps", text_of(log))
    ranks = read_heartbeats(run)
    assert len(ranks) == BEFORE, log.read_text()
    saved = store.folder_of(run) / store.tag_of(4)
    wait_for(lambda: saved in store.list_checkpoints(run), "the save of step 4", text_of(log))
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    wait_for_end(launcher, "the launcher", text_of(log))
    assert launcher.exitcode not in (0, 75)

    program.check(AFTER, "pretrain.train", "--config", small_recipe)
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert f"resumed from {saved}" in program.output
    assert {record["lr"] for record in records} == {1e-4}
    for record in records:
        assert min(record[f"loss_{name}/coco_{split}"] for name in ("mlm", "itc") for split in ("train", "val")) > 0
    manifest = json.loads((store.folder_of(run) / store.tag_of(STEPS) / "state.json").read_text())
    assert manifest["world_size"] == AFTER
    # All ranks together have read each position of the last steps once.
    read = Counter()
    for path in (run / "ledger").iterdir():
        for line in map(json.loads, path.read_text().splitlines()):
            read[line["step"]] += len(line["samples"]) if line["step"] > 4 else 0
    assert read[5] == read[6] == 48

    program.check(0, "pretrain.export", run, "--out", tmp_path / "weights", "--dtype", "fp32")
    weights = load_file(tmp_path / "weights" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
