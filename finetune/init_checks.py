"""Whether the weights that ``init`` names fit a task and its image size, checked before anything is built.

Source: none.
"""

import re
from pathlib import Path

from finetune.task import Task
from unimo3.errors import CheckpointError
from unimo3.model import downstream
from unimo3.model.config import Unimo3Config
from unimo3.model.pretrained.fill import read_names
from unimo3.model.unimo3 import Unimo3PreTrainedModel

_TASK_CLASSES = {
    name
    for name, value in vars(downstream).items()
    if isinstance(value, type) and issubclass(value, Unimo3PreTrainedModel) and value.__module__ == downstream.__name__
}


def task_errors(init: str, config: Unimo3Config, task: type[Task]) -> list[str]:
    """Return an error if weights were tuned for another task, by the class that their configuration names."""
    expected = task.architecture
    other = [name for name in config.architectures or () if name in _TASK_CLASSES - {expected}]
    if not other:
        return []
    return [
        f"init: '{init}': contains weights of {other[0]}, this task tunes {expected}; name "
        "pretraining's weights, or some "
        "that were tuned for this task"
    ]


def head_errors(init: str, folder: str, config: Unimo3Config, task: type[Task]) -> list[str]:
    """Return an error if weights lack a task's head, which an evaluation without training needs.

    Args:
        folder: with the configuration and, unless `init` is a run, the weights; a run's configuration names its class.
    """
    try:
        names = read_names(Path(folder))
    except CheckpointError:
        has_head = task.architecture in (config.architectures or ())
    else:
        has_head = any(re.search(task.fresh, name) for name in names)
    if has_head or re.search(task.fresh, ""):
        return []
    return [
        f"eval_only: true: the run has no checkpoint, and init '{init}' contains no weights tuned for this task; name "
        "some, or train first"
    ]


def resized(config: Unimo3Config, image_size: int) -> list[str]:
    """Set a configuration's image size, unless it is 0; return where that does not fit, one line per error."""
    if image_size < 0:
        return [f"image_size: {image_size}: a number of pixels is needed, or 0 for the weights' own"]
    if image_size:
        config.vision_config.image_size = image_size
    return [problem.removeprefix("model.vision.") for problem in config.vision_config.validate()]
