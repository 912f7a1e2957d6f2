"""What the training loop logs of a step."""

from types import SimpleNamespace

import pytest

from unimo3.training.args import TrainingArgs
from unimo3.training.metrics import StepResult
from unimo3.training.progress import Progress
from unimo3.training.trainer import Trainer


@pytest.mark.parametrize(
    ("means", "rank", "is_warned"),
    [
        ({"single_image_ratio": 0.5}, 0, True),
        ({"single_image_ratio": 0.5}, 1, False),
        ({"single_image_ratio": 0.0}, 0, False),
        ({}, 0, False),
    ],
)
def test_a_step_of_one_image_is_recorded_and_warned_of(caplog, means, rank, is_warned):
    written = []
    metrics = SimpleNamespace(write=written.append)
    trainer = SimpleNamespace(
        run=SimpleNamespace(step=1, num_bad_samples=0, num_skipped=0, metrics=metrics),
        training_args=TrainingArgs(steps=2, global_batch=8),
        progress=Progress(num_steps=2, first_step=0, log_every=50, rank=rank),
        throughput=None,
    )
    step = StepResult({}, {}, num_bad=0, lr=0.1, grad_norm=1.0, was_skipped=False, step_s=1.0, data_s=0.0)
    Trainer.log_step(trainer, step, {"loss": 1.0, **means})
    assert written[0].get("single_image_ratio") == means.get("single_image_ratio")
    assert ("in 50% of the micro-steps all pairs have one image_id" in caplog.text) == is_warned
