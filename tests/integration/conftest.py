"""Complete commands in processes of their own, on shards of a small source; started as few times as possible."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from tests.commands import start_command
from tests.data.conftest import coco, source, vqav2  # noqa: F401  (fixtures)
from tests.waiting import text_of, wait_for, wait_for_end
from unimo3.training.metrics import read_metrics

# Persistent parameters would hide errors in gathering and partitioning.
DS_CONFIG = """{
  "bf16": {"enabled": %s},
  "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100000},
  "steps_per_print": 1000000000
}"""

MODEL = {
    "text": {
        "vocab_size": 400,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 20,
        "dropout": 0.1,
    },
    "vision": {"image_size": 32, "patch_size": 16, "width": 32, "depth": 2, "num_heads": 2},
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "dropout": 0.1,
    "itc_size": 16,
}

TWO_MICRO_STEPS = ("--training.micro_batch", "2")


class Program:
    """Starts commands and keeps their output."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.output = ""

    def run(self, num_ranks, module, *arguments, stop_when=None, limits=None, inject=None):
        """Start a module on `num_ranks` ranks; send SIGTERM once `stop_when` is true; return the exit status.

        Args:
            limits: of the process, by their numbers in `resource`, such as RLIMIT_FSIZE for a disk that is full.
            inject: of the module `tests.inject`.
        """

        launch = ["unimo3.launch", "-n", str(num_ranks), "--grace", "30"] if num_ranks else []
        command, *words = [*launch, module, *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        environment |= {"INJECT": json.dumps(inject)} if inject is not None else {}
        log = self.folder / "output.log"
        log.write_text("")
        process = start_command(command, words, environment, log, limits)
        if stop_when is not None:
            wait_for(lambda: process.exitcode is not None or stop_when(), f"the stop of {module}", text_of(log))
            os.kill(process.pid, signal.SIGTERM)
        wait_for_end(process, module, text_of(log))
        self.output = log.read_text()
        return process.exitcode

    def check(self, *arguments, **options):
        """`run`, with status 0 expected."""
        status = self.run(*arguments, **options)
        assert status == 0, self.output[-4000:]


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return Program(tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="session")
def recipe(coco, tmp_path_factory):  # noqa: F811
    """A recipe file for 20 steps of 8 pairs in bf16 under ZeRO-3."""
    folder = tmp_path_factory.mktemp("recipe")
    for name, bf16 in (("bf16", "true"), ("fp32", "false")):
        (folder / f"{name}.json").write_text(DS_CONFIG % bf16)
    settings = {
        "run": {"dir": str(folder / "runs")},
        "model": MODEL,
        "data": {
            "train": str(coco / "train"),
            "val": str(coco / "val"),
            "tokenizer": str(coco / "tokenizer"),
            "max_text_tokens": 16,
            "num_workers": 1,
            "window_shards": 2,
            "ledger": True,
        },
        # With one micro-step, as here, nothing runs first.
        "objectives": {"itc": {"over": "step"}},
        "optim": {"lr": 3.0e-3, "fusion_factor": 2.0, "head_factor": 2.0},
        "training": {
            "steps": 20,
            "global_batch": 8,
            "micro_batch": 4,
            "ds_config": str(folder / "bf16.json"),
            "eval_every": 4,
        },
        "checkpoint": {"every_steps": 6, "keep_last": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="session")
def runs(recipe):
    return recipe.parent / "runs"


@pytest.fixture(scope="session")
def straight(program, recipe, runs):
    """20 steps of two micro-steps on two ranks, without a stop."""
    program.check(2, "pretrain.train", "--config", recipe, "--run.name", "straight", *TWO_MICRO_STEPS)
    return runs / "straight"


@pytest.fixture(scope="session")
def weights(program, straight, recipe):
    """The straight run's weights in float32."""
    out = recipe.parent / "weights"
    program.check(0, "pretrain.export", straight, "--out", out, "--dtype", "fp32")
    return out


def losses(run):
    """Every step's losses of a run."""
    return [
        {name: value for name, value in record.items() if name.startswith(("loss", "accuracy", "grad_norm"))}
        for record in read_metrics(run)
    ]
