"""Settings of fine-tuning, and the checks that all tasks share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from unimo3.checkpoint import store
from unimo3.checkpoint.args import CheckpointArgs
from unimo3.checkpoint.initial_weights import config_errors, config_of, has_begun, model_files_of
from unimo3.config import Checked
from unimo3.data.args import DataArgs
from unimo3.data.tokenizer import load_tokenizer
from unimo3.distributed import world_size_from_environment
from unimo3.errors import ConfigError
from unimo3.kernels.args import KernelArgs
from unimo3.model.tokenizer_checks import tokenizer_errors
from unimo3.training.args import OptimArgs, TrainingArgs
from unimo3.training.ds_config import BatchPlan
from unimo3.training.early_stopping import BestArgs
from unimo3.training.heartbeat import other_process
from unimo3.training.run import RunArgs, changed_settings

if TYPE_CHECKING:
    from finetune.task import Task
    from unimo3.model.config import Unimo3Config


@dataclass(frozen=True)
class FinetuneConfig(Checked):
    """Settings that fine-tuning runs of all tasks have; those of a task add to them."""

    run: RunArgs = field(default_factory=RunArgs)
    init: str = ""
    """What to start from: an exported folder, or a run or one of its checkpoints, which is exported into this run's
    folder first; or the URL of one in an object store, which is copied there. data.tokenizer: the same exported folder
    or URL, or RUN/model."""
    image_size: int = 0
    """Height and width of the input in pixels, a multiple of the patch size; position tables are resized to it. 0: as
    the weights were trained."""
    eval_only: bool = False
    """Whether to write metrics and predictions for data.val and train no step: of the run's newest checkpoint, or, in a
    new run, of the tuned weights that init names."""
    data: DataArgs = field(default_factory=DataArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    training: TrainingArgs = field(default_factory=TrainingArgs)
    kernels: KernelArgs = field(default_factory=KernelArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)
    best: BestArgs = field(default_factory=BestArgs)

    task: "ClassVar[type[Task]]"

    def quick_errors(self) -> list[str]:
        """Return which settings do not fit together or the shards, or name no weights, one line per error."""
        errors = self.batch_plan(world_size_from_environment()).validate() + changed_settings(self)
        length = self.data.stream_length(self.training.steps, self.training.global_batch)
        errors += self.data.shard_errors(self.task.kind, length, trains=not self.eval_only)
        if self.eval_only and self.data.val is None:
            errors.append("eval_only: true: data.val names nothing to evaluate on; name held-out shards")
        if self.eval_only:
            errors += busy_errors(self.run.folder)
        if self.best.patience and (self.data.val is None or not self.training.eval_every):
            errors.append(
                f"best.patience: {self.best.patience}: counts evaluations; set data.val and training.eval_every"
            )
        return errors + config_errors(model_files_of(self.init, self.run.folder))

    def slow_errors(self) -> list[str]:
        """Return where weights, tokenizer and task do not fit together, one line per error."""
        from finetune.init_checks import head_errors, resized, task_errors
        from unimo3.checkpoint.export import changed_files
        from unimo3.training.parts import freeze_errors

        try:
            model = config_of(self.init, self.run.folder)
        except ConfigError as error:
            return error.errors
        errors = task_errors(self.init, model, self.task)
        trained_at = model.vision_config.image_size
        errors += resized(model, self.image_size)
        if self.eval_only and self.image_size not in (0, trained_at):
            errors.append(
                f"image_size: {self.image_size}: the weights were tuned at {trained_at}, and none are trained here; "
                "leave it out"
            )
        if self.eval_only and not has_begun(self.run.folder):
            errors += head_errors(self.init, model_files_of(self.init, self.run.folder), model, self.task)
        errors += [] if errors else freeze_errors(model, self.optim)
        errors += [f"init: {problem}" for problem in changed_files(model_files_of(self.init, self.run.folder))]
        return errors + self._tokenizer_errors(model)

    def _tokenizer_errors(self, model: "Unimo3Config") -> list[str]:
        try:
            tokenizer = load_tokenizer(self.data.tokenizer)
        except ConfigError:
            return []  # the data group reports it
        errors = tokenizer_errors(model.text_config, tokenizer, self.data.max_text_tokens, is_trained=True)
        errors += self.data.text_errors(tokenizer, self.task.kind, trains=not self.eval_only)
        try:
            trained = load_tokenizer(model_files_of(self.init, self.run.folder))
        except ConfigError:
            return [
                *errors,
                f"init: '{self.init}': contains no tokenizer; name a folder that python -m pretrain.export wrote",
            ]
        if trained.get_vocab() != tokenizer.get_vocab():
            errors.append(
                f"data.tokenizer: '{self.data.tokenizer}': has another vocabulary than the weights were trained with; "
                f"use {model_files_of(self.init, self.run.folder)}"
            )
        return errors

    def build_task(self) -> "Task":
        """The task, with what of it the settings decide."""
        return self.task()

    def planned_task(self) -> "Task":
        """The task of a run that is planned, whose files need not exist yet."""
        return self.build_task()

    def planned_errors(self) -> list[str]:
        """Errors of a task's own settings when a run is planned."""
        return []

    def batch_plan(self, world_size: int) -> BatchPlan:
        """How the global batch is spread over `world_size` ranks."""
        contrasts = self.task.contrasts and not self.eval_only
        return BatchPlan(self.training.global_batch, self.training.micro_batch, world_size, contrasts)


def busy_errors(run: Path) -> list[str]:
    """Return an error if another process uses a run: metrics and heartbeats of two would mix."""
    beat = other_process(run)
    if beat is None:
        return []
    newest = store.list_checkpoints(run)[-1:]
    init = newest[0] if newest else "CHECKPOINT"
    return [
        f"eval_only: true: {run} is in use, rank {beat.rank} is at step {beat.step} (pid {beat.pid} on {beat.host}); "
        f"evaluate in a separate run, --run.name NAME --init {init}, or wait for the end"
    ]
