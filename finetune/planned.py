"""Fine-tuning runs that are yet to come: their settings, their model before there are weights, and their step.

Source: METER, arXiv 2111.02387, for the number of VQAv2's answers.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from finetune.nlvr2 import Nlvr2Config
from finetune.program import FinetuneConfig
from finetune.retrieval import RetrievalConfig
from finetune.snli_ve import SnliVeConfig
from finetune.task import Task
from finetune.vqa import Vqa, VqaConfig
from finetune.weights import resized, task_errors
from unimo3 import config
from unimo3.checkpoint.initial_weights import config_of
from unimo3.data.answers import AnswerVocabulary
from unimo3.errors import ConfigError
from unimo3.model.args import ModelArgs
from unimo3.model.config import Unimo3Config
from unimo3.training.plan.make import PlannedRun
from unimo3.training.plan.settings import PlannedData, PlannedTraining
from unimo3.training.plan.trace import Batch, Step, blank_inputs

PUBLISHED_ANSWERS = 3129
"""Of VQAv2: what was given as an answer at least nine times, and METER's classes."""
_NOT_COUNTED = ["waiting for ranks and data", "evaluation"]
_MODEL = "model."


@dataclass(frozen=True)
class PlannedFinetuning(FinetuneConfig):
    """Settings of a run of any task, whose shards and weights need not exist yet."""

    model_recipe: str = ""
    """Pretraining recipe whose model is to be tuned, in place of init."""
    data: PlannedData = field(default_factory=PlannedData)
    training: PlannedTraining = field(default_factory=PlannedTraining)

    def validate(self) -> list[str]:
        """Say which settings do not fit together, one line an error; nothing is asked of the shards."""
        found = []
        if self.eval_only:
            found.append("eval_only: true: what is planned is training; leave it out")
        try:
            model = self.model_config()
        except ConfigError as error:
            return found + error.errors
        return found + self.data.model_errors(model)

    def model_config(self) -> Unimo3Config:
        """The model's configuration, at the task's resolution.

        Raises:
            ConfigError: there is none, or it does not fit the task.
        """
        if self.init and self.model_recipe:
            raise ConfigError(f"--model {self.model_recipe}: init '{self.init}' names the model too; leave one out")
        if not self.init and not self.model_recipe:
            raise ConfigError(
                "init: '': names no weights; give --init an exported folder or a run, or --model a pretraining recipe, "
                "such as pretrain/recipes/base.yaml"
            )
        found = config_of(self.init, self.run.folder) if self.init else model_of_recipe(self.model_recipe)
        if errors := task_errors(self.init, found, self.task) + resized(found, self.image_size):
            raise ConfigError(errors)
        return found

    def planned_run(self) -> PlannedRun:
        """What decides the plan."""
        model, task = self.model_config(), self.build_task()
        task.configure(model)
        words = {"unit": task.unit, "not_counted": _NOT_COUNTED}
        return PlannedRun(self._step(model, task), self.training, self.optim.clip_norm, words)

    def _step(self, model: Unimo3Config, task: Task) -> Step:
        def batch(num_rows: int) -> Batch:
            inputs = blank_inputs(model, num_rows, self.data.max_text_tokens, task.num_images)
            return inputs | task.blank_labels(num_rows)

        return Step(model, task.model_class, task.objective, batch, self.kernels)


@dataclass(frozen=True)
class PlannedVqa(PlannedFinetuning, VqaConfig):
    """VQA, with the published number of answers where there is no vocabulary yet."""

    def validate(self) -> list[str]:
        """As of any task, and of a vocabulary that is named or found."""
        return super().validate() + (self.answers_errors() if self._has_answers else [])

    def build_task(self) -> Vqa:
        """The task, with its vocabulary or one of the published size."""
        if self._has_answers:
            return super().build_task()
        return Vqa(AnswerVocabulary([str(number) for number in range(PUBLISHED_ANSWERS)]))

    @property
    def _has_answers(self) -> bool:
        return bool(self.answers) or (self.answers_path is not None and self.answers_path.is_file())


@dataclass(frozen=True)
class PlannedNlvr2(PlannedFinetuning, Nlvr2Config):
    """NLVR2."""


@dataclass(frozen=True)
class PlannedSnliVe(PlannedFinetuning, SnliVeConfig):
    """SNLI-VE."""


@dataclass(frozen=True)
class PlannedRetrieval(PlannedFinetuning, RetrievalConfig):
    """Retrieval."""


PLANNED: dict[str, type[PlannedFinetuning]] = {
    "vqa": PlannedVqa,
    "nlvr2": PlannedNlvr2,
    "snli_ve": PlannedSnliVe,
    "retrieval": PlannedRetrieval,
}


@dataclass(frozen=True)
class _ModelOfRecipe:
    model: ModelArgs = field(default_factory=ModelArgs)


def model_of_recipe(path: str) -> Unimo3Config:
    """The configuration that a pretraining recipe's ``model`` gives.

    Raises:
        ConfigError: it cannot be read, has none, or it cannot be.
    """
    given = config.read_flat(Path(path), option="--model")
    settings = {name: value for name, value in given.items() if name.startswith(_MODEL)}
    if not settings:
        raise ConfigError(
            f"--model {path}: has no model; name a pretraining recipe, such as pretrain/recipes/base.yaml"
        )
    texts = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]
    try:
        return config.parse(_ModelOfRecipe, texts, "", "").model.to_config()
    except ConfigError as error:
        raise ConfigError([f"--model {path}: {problem}" for problem in error.errors]) from error
