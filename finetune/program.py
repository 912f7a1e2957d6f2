"""The program that all fine-tuning tasks share: exported weights -> a tuned run, its metrics and its predictions.

Started once a rank; starting it again resumes. `Task` defines what is specific to a task.

Source: nanoGPT and lingua for one program that reads setup -> build -> loop.
"""

import logging
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from finetune.results import write_files
from finetune.task import HeldOut, Reading, Task
from finetune.weights import head_errors, resized, task_errors
from unimo3.checkpoint import store
from unimo3.checkpoint.args import CheckpointArgs
from unimo3.checkpoint.initial_weights import config_of, has_begun, model_files_of, weights_of
from unimo3.data.args import DataArgs
from unimo3.data.index import TEST_SPLITS
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import Augment, ImageTransform, image_processor
from unimo3.distributed import broadcast_object, world_size_from_environment
from unimo3.engine import Engine
from unimo3.errors import ConfigError
from unimo3.kernels.args import KernelArgs
from unimo3.model.args import tokenizer_errors
from unimo3.model.config import Unimo3Config
from unimo3.model.initialization import initialize_weights
from unimo3.model.pretrained import load_exported
from unimo3.model.processor import Unimo3Processor
from unimo3.training.args import TrainingArgs
from unimo3.training.early_stopping import Best, BestArgs
from unimo3.training.engine import BatchPlan, build_engine, build_model, prepare_layers, read_ds_config
from unimo3.training.evaluation import Evaluation, Guard
from unimo3.training.heartbeat import other_process
from unimo3.training.optim import OptimArgs
from unimo3.training.run import Run, RunArgs, changed_settings
from unimo3.training.start import start_process

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings that fine-tuning runs of all tasks have; those of a task add to them."""

    run: RunArgs = field(default_factory=RunArgs)
    init: str = ""
    """What to start from: an exported folder, or a run or one of its checkpoints, which is exported into this run's
    folder first. data.tokenizer: the same exported folder, or RUN/model."""
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

    task: ClassVar[type[Task]]

    def validate(self) -> list[str]:
        """Return which settings do not fit together, one line per error."""
        errors = self.batch_plan(world_size_from_environment()).validate() + changed_settings(self)
        errors += self.data.shard_errors(self.task.kind, trains=not self.eval_only)
        if self.eval_only and self.data.val is None:
            errors.append("eval_only: true: data.val names nothing to evaluate on; name held-out shards")
        if self.eval_only:
            errors += busy_errors(self.run.folder)
        if self.best.patience and (self.data.val is None or not self.training.eval_every):
            errors.append(
                f"best.patience: {self.best.patience}: counts evaluations; set data.val and training.eval_every"
            )
        try:
            model = config_of(self.init, self.run.folder)
        except ConfigError as error:
            return errors + error.errors
        errors += task_errors(self.init, model, self.task)
        trained_at = model.vision_config.image_size
        errors += resized(model, self.image_size)
        if self.eval_only and self.image_size not in (0, trained_at):
            errors.append(
                f"image_size: {self.image_size}: the weights were tuned at {trained_at}, and none are trained here; "
                "leave it out"
            )
        if self.eval_only and not has_begun(self.run.folder):
            errors += head_errors(self.init, model_files_of(self.init, self.run.folder), model, self.task)
        return errors + self._tokenizer_errors(model)

    def _tokenizer_errors(self, model: Unimo3Config) -> list[str]:
        try:
            tokenizer = load_tokenizer(self.data.tokenizer)
        except ConfigError:
            return []  # the data group reports it
        errors = tokenizer_errors(model.text_config, tokenizer, self.data.max_text_tokens, is_trained=True)
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

    def build_task(self) -> Task:
        """The task, with what of it the settings decide."""
        return self.task()

    def planned_task(self) -> Task:
        """The task of a run that is planned, whose files need not exist yet."""
        return self.build_task()

    def planned_errors(self) -> list[str]:
        """Errors of a task's own settings when a run is planned."""
        return []

    def batch_plan(self, world_size: int) -> BatchPlan:
        """How the global batch is spread over `world_size` ranks."""
        return BatchPlan(self.training.global_batch, self.training.micro_batch, world_size)


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


def finetune(settings: FinetuneConfig, task: Task) -> None:
    """Train until done, or evaluate only; every rank calls it.

    Raises:
        Interrupted: asked to stop; a checkpoint has been saved.
        Unimo3Error: see `train`; or the weights do not fit.
    """
    from unimo3.training.trainer import Trainer  # imports deepspeed, which predict does without

    tokenizer = load_tokenizer(settings.data.tokenizer)
    # Programs that load the exported folder truncate texts where this run does.
    tokenizer.model_max_length = settings.data.max_text_tokens
    model_config = config_of(settings.init, settings.run.folder)
    resized(model_config, settings.image_size)
    task.configure(model_config)
    model_config.architectures = [task.model_class.__name__]
    indexes = [] if settings.eval_only else settings.data.open_train()
    val_index = settings.data.open_val()
    if val_index is not None and val_index.fingerprint in [index.fingerprint for index in indexes]:
        log.warning(
            "data.val: '%s' is trained on as well: its metrics, and the best checkpoint by them, are not those "
            "of other data",
            val_index.source,
        )
    process = start_process(settings.run, settings.training.stall_after_s)
    world = process.world
    batch = settings.batch_plan(world.size)
    engine = _build_engine(settings, task, model_config, batch)

    fingerprint = None if settings.eval_only else settings.data.fingerprint(indexes)
    run = Run(settings, batch.global_batch, fingerprint)
    image_size = model_config.vision_config.image_size
    run.write_model_files(model_config, Unimo3Processor(image_processor(image_size), tokenizer), *task.model_files())
    run.resume(engine)

    def reading(augment: Augment, crop_scale: float) -> Reading:
        transform = ImageTransform(image_size, augment, crop_scale)
        return Reading(tokenizer, settings.data.max_text_tokens, transform, settings.run.seed)

    trained = reading(settings.data.augment, settings.data.crop_scale)
    loader = None
    if not settings.eval_only:
        loader = settings.data.training_loader(
            [task.samples(index, trained) for index in indexes],
            batch.global_batch,
            batch.micro_batch,
            world.rank,
            world.size,
            settings.run.seed,
            run.step,
        )
    evaluation = None
    if val_index is not None:
        held_out = HeldOut(val_index, reading("none", 1.0), world, batch.micro_batch, settings.data.reader)
        evaluation = _evaluation(settings, task, engine, run, held_out)
    with closing(run):
        Trainer(settings, process, run, engine, loader, evaluation).train()


def _build_engine(settings: FinetuneConfig, task: Task, model_config: Unimo3Config, batch: BatchPlan) -> Any:
    # If a run continues, the checkpoint has all weights.
    begins = broadcast_object(not has_begun(settings.run.folder))
    weights = weights_of(settings.init, settings.run.folder, newest=settings.eval_only) if begins else ""
    training = settings.training
    ds_config = read_ds_config(training.ds_config, batch, settings.optim.clip_norm)
    model = build_model(ds_config, lambda: task.model_class(model_config))
    initialize_weights(model, settings.run.seed, model_config.initializer_range)
    if weights:
        # A head may start random only where it will be trained.
        load_exported(model, weights, fresh=r"^$" if settings.eval_only else task.fresh)
    prepare_layers(model, settings.kernels, training.activation_checkpointing, training.compile_towers)
    return build_engine(task.objective(model), model, ds_config, settings.optim)


def _evaluation(settings: FinetuneConfig, task: Task, engine: Engine, run: Run, held_out: HeldOut) -> Evaluation:
    index, world = held_out.shards, held_out.world

    def evaluate(step: int, guard: Guard) -> dict[str, float] | None:
        results = task.evaluate(engine, held_out, guard)
        if results is None:
            return None
        if world.rank == 0:
            written = write_files(run.folder, results.files, index.split, index.fingerprint)
            kind = "metrics and answers" if results.metrics else "answers"
            log.info("%s for %s: %s", kind, index.split, ", ".join(map(str, written)))
        return results.metrics

    chooses_on = None if settings.eval_only or index.split in TEST_SPLITS else index.fingerprint
    best = None
    if settings.best.keep:
        best = Best(settings.best, task.best_metric, chooses_on, settings.training.eval_every)
    return Evaluation(index.fingerprint, evaluate, index.split, best)
