"""Settings of pretraining that do not fit together."""

import pytest

from pretrain.train import PretrainConfig
from unimo3.objectives.args import ItcArgs, ItmArgs, ObjectivesArgs
from unimo3.training.args import TrainingArgs

NOTHING = "training.micro_batch: 1: ITC and ITM draw negatives from one micro-step"


@pytest.mark.parametrize(
    ("itc", "itm", "num_ranks", "micro_batch", "is_refused"),
    [
        (1.0, ItmArgs(), 1, 1, True),
        (0.5, ItmArgs(weight=0.0), 1, 1, True),
        (0.0, ItmArgs(), 1, 1, True),
        (1.0, ItmArgs(negatives="hard"), 1, 1, True),
        (0.0, ItmArgs(weight=0.0), 1, 1, False),
        (1.0, ItmArgs(), 2, 1, False),
        (1.0, ItmArgs(), 1, 2, False),
    ],
)
def test_contrast_and_matching_need_two_pairs(monkeypatch, itc, itm, num_ranks, micro_batch, is_refused):
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    training = TrainingArgs(global_batch=4, micro_batch=micro_batch)
    errors = PretrainConfig(objectives=ObjectivesArgs(itm=itm, itc=ItcArgs(itc)), training=training).validate()
    assert [problem for problem in errors if "micro_batch" in problem and problem.startswith(NOTHING)] == [
        problem for problem in errors if "micro_batch" in problem
    ]
    assert any(problem.startswith(NOTHING) for problem in errors) == is_refused
