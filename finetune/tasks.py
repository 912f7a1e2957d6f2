"""The fine-tuning tasks and the evaluations. A new one is a module of this package, its recipes, and a line here.

The class of a task's settings names the task's class (`task`), which names its model and its predictor.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.args import FinetuneConfig

# Class of the settings in each task's module. Job scripts read the names, without the seconds that torch takes.
TASKS = {
    "nlvr2": "Nlvr2Config",
    "retrieval": "RetrievalConfig",
    "snli_ve": "SnliVeConfig",
    "vqa": "VqaConfig",
}
# With the tasks that train nothing.
PROGRAMS = TASKS | {"choose": "ChooseConfig"}


def config_class(task: str) -> "type[FinetuneConfig]":
    """The settings of a task, one of `PROGRAMS`."""
    settings: type[FinetuneConfig] = getattr(importlib.import_module(f"finetune.{task}"), PROGRAMS[task])
    return settings
