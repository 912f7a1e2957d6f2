"""What the training loop shows of a step."""

import pytest

from unimo3.training.metrics import StepResult, step_metrics
from unimo3.training.progress import StepProgress


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
    result = StepResult({}, {}, num_bad=0, lr=0.1, raw_norm=1.0, was_skipped=False, step_s=1.0, data_s=0.0)
    metrics = step_metrics(1, 8, result, {"loss": 1.0, **means}, None, {})
    assert metrics.get("single_image_ratio") == means.get("single_image_ratio")
    StepProgress(num_steps=2, first_step=0, log_every=50, rank=rank).show(metrics)
    assert ("in 50% of the micro-steps all pairs have one image_id" in caplog.text) == is_warned
