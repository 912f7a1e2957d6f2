"""Planned fine-tuning runs: their settings, their model before there are weights, and their step.

Source: none.
"""

import json
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.args import FinetuneConfig
from unimo3 import config
from unimo3.checkpoint.initial_weights import config_of
from unimo3.errors import ConfigError
from unimo3.kernels.args import KernelArgs
from unimo3.model.args import ModelArgs
from unimo3.training.args import OptimArgs
from unimo3.training.plan.settings import PlannedData, PlannedTraining

if TYPE_CHECKING:
    from finetune.task import Task
    from unimo3.model.config import Unimo3Config
    from unimo3.training.plan.make import PlannedRun
    from unimo3.training.plan.step_trace import Batch, Step

_NOT_COUNTED = ["waiting for ranks and data", "evaluation"]
_MODEL = "model."


@dataclass(frozen=True)
class PlannedFinetuning(FinetuneConfig):
    """Settings of a run of any task, whose shards and weights need not exist yet."""

    model_recipe: str = ""
    """Pretraining recipe whose model is to be tuned, instead of init."""
    data: PlannedData = field(default_factory=PlannedData)
    training: PlannedTraining = field(default_factory=PlannedTraining)

    def quick_errors(self) -> list[str]:
        """Return an error if nothing is to be trained; the shards are not read."""
        return ["eval_only: true: only training is planned; leave it out"] if self.eval_only else []

    def slow_errors(self) -> list[str]:
        """Return where model, task, tokenizer and length of texts do not fit together, one line per error."""
        from unimo3.training.parts import freeze_errors

        try:
            model = self.model_config()
            errors = self.data.model_errors(model) + freeze_errors(model, self.optim)
        except ConfigError as error:
            errors = error.errors
        return errors + self.planned_errors()

    def model_config(self) -> "Unimo3Config":
        """The model's configuration, at the task's resolution.

        Raises:
            ConfigError: there is none, or it does not fit the task.
        """
        from finetune.init_checks import resized, task_errors

        if self.init and self.model_recipe:
            raise ConfigError(f"--model {self.model_recipe}: init '{self.init}' names the model too; leave one out")
        if not self.init and not self.model_recipe:
            raise ConfigError(
                "init: '': names no weights; give --init an exported folder or a run, or --model a pretraining recipe, "
                "such as pretrain/recipes/base.yaml"
            )
        model = config_of(self.init, self.run.folder) if self.init else model_of_recipe(self.model_recipe)
        if errors := task_errors(self.init, model, self.task) + resized(model, self.image_size):
            raise ConfigError(errors)
        return model

    def planned_run(self) -> "PlannedRun":
        """What decides the plan."""
        from unimo3.training.plan.make import PlannedRun

        model, task = self.model_config(), self.planned_task()
        task.configure(model)
        words = {"unit": task.unit, "not_counted": _NOT_COUNTED}
        step = tuning_step(model, task, self.data.max_text_tokens, self.kernels, self.optim)
        return PlannedRun(step, self.training, self.optim.clip_norm, task.contrasts, words)


def tuning_step(model: "Unimo3Config", task: "Task", num_tokens: int, kernels: KernelArgs, optim: OptimArgs) -> "Step":
    """A task's step.

    Args:
        num_tokens: T; texts are counted at full length.
    """
    from unimo3.training.plan.step_trace import Step, blank_inputs

    def batch(num_rows: int) -> "Batch":
        inputs = blank_inputs(model, num_rows, num_tokens, task.num_images)
        return inputs | task.blank_labels(num_rows)

    return Step(model, task.model_class(), task.objective, batch, kernels, optim)


def planned(config_class: type[FinetuneConfig]) -> type[PlannedFinetuning]:
    """A task's settings as those of a run that is planned."""
    return make_dataclass(f"Planned{config_class.__name__}", [], bases=(PlannedFinetuning, config_class), frozen=True)


@dataclass(frozen=True)
class _ModelOfRecipe:
    model: ModelArgs = field(default_factory=ModelArgs)


def model_of_recipe(path: str) -> "Unimo3Config":
    """The configuration that a pretraining recipe's ``model`` gives.

    Raises:
        ConfigError: it cannot be read, has no model, or an invalid one.
    """
    recipe = config.read_flat(Path(path), option="--model")
    settings = {name: value for name, value in recipe.items() if name.startswith(_MODEL)}
    if not settings:
        raise ConfigError(
            f"--model {path}: has no model; name a pretraining recipe, such as pretrain/recipes/base.yaml"
        )
    texts = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]
    try:
        return config.parse(_ModelOfRecipe, texts, "", "").model.to_config()
    except ConfigError as error:
        raise ConfigError([f"--model {path}: {problem}" for problem in error.errors]) from error
