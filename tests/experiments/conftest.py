"""The toy data and a finished run that the tests of the ablation and of its peer share."""

from pathlib import Path

import pytest

from experiments.ablation_run import TrainingRun
from experiments.ablation_settings import Data, Settings

TINY = Settings(images=60, image_size=32, layers=2, width=32, pretraining_steps=2, vqa_steps=2, batch=8)


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    Data(folder, TINY).make()
    return folder


@pytest.fixture(scope="session")
def finished(work) -> TrainingRun:
    """One run done in this process, as if the ablation had been killed after it."""
    done = TrainingRun(TINY, "in_layer", 0)
    done.do(work)
    return done
