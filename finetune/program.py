"""The program that all fine-tuning tasks share: exported weights -> a tuned run, its metrics and its predictions.

Started once a rank; starting it again resumes. `Task` defines what is specific to a task.

Source: nanoGPT and lingua for one program that reads setup -> build -> loop.
"""

import functools
import logging
from contextlib import closing
from typing import TYPE_CHECKING, Any

from finetune.args import FinetuneConfig
from finetune.init_checks import resized
from finetune.plan_settings import tuning_step
from finetune.results import write_files
from finetune.task import HeldOut, InputSettings, Task
from unimo3.checkpoint.initial_weights import config_of, has_begun, run_of, weights_of
from unimo3.data.index import is_test_split
from unimo3.data.shard_checks import check_same_indexes
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform, image_processor
from unimo3.distributed import broadcast_object
from unimo3.engine import Engine
from unimo3.errors import ConfigError
from unimo3.model.config import Unimo3Config
from unimo3.model.initialization import initialize_weights
from unimo3.model.pretrained import exported_errors, load_exported
from unimo3.model.processor import Unimo3Processor
from unimo3.object_store import is_store
from unimo3.training.ds_config import read_ds_config
from unimo3.training.early_stopping import Best
from unimo3.training.engine import build_engine, build_model, prepare_layers
from unimo3.training.evaluation import Evaluation, Guard
from unimo3.training.nvme import swap_folder
from unimo3.training.process import start_process
from unimo3.training.run import Run
from unimo3.training.sample_pictures import sample_pictures
from unimo3.training.throughput import count_operations
from unimo3.training.trainer import Trainer

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


def finetune(settings: FinetuneConfig, task: Task) -> None:
    """Train until done, or evaluate only; every rank calls it.

    Raises:
        Interrupted: asked to stop; a checkpoint has been saved.
        Unimo3Error: see `train`; or the weights do not fit.
    """
    tokenizer = load_tokenizer(settings.data.tokenizer)
    # Programs that load the exported folder truncate texts where this run does.
    tokenizer.model_max_length = settings.data.max_text_tokens
    # A head may start random only where it will be trained.
    fresh = r"^$" if settings.eval_only else task.fresh
    model_config = _model_config(settings, task, fresh)
    indexes = [] if settings.eval_only else settings.data.open_train()
    val_index = settings.data.open_val()
    if val_index is not None and val_index.fingerprint in [index.fingerprint for index in indexes]:
        log.warning(
            "data.val: '%s' is trained on as well: its metrics, and the best checkpoint by them, are not those "
            "of other data",
            val_index.source,
        )
    image_size = model_config.vision_config.image_size
    settings.data.check_limits(
        settings.training.micro_batch, image_size, task.num_images, trains=not settings.eval_only
    )
    process = start_process(settings.run, settings.training.stall_after_s)
    world = process.world
    check_same_indexes(indexes, val_index)
    batch = settings.batch_plan(world.size)
    swap = swap_folder(settings.training.nvme_path, settings.run.folder)
    ds_config = read_ds_config(settings.training.ds_config, batch, settings.optim.clip_norm, swap)
    throughput = None
    if not settings.eval_only:
        throughput = count_operations(
            lambda: tuning_step(model_config, task, settings.data.max_text_tokens, settings.kernels, settings.optim),
            ds_config,
            world,
        )
    engine = _build_engine(settings, task, model_config, ds_config, fresh)

    if settings.eval_only:
        run = Run(settings, batch.global_batch, None)
    else:
        run = Run(settings, batch.global_batch, settings.data.fingerprint(indexes), settings.data.facts(indexes))
    run.write_model_files(model_config, Unimo3Processor(image_processor(image_size), tokenizer), *task.model_files())
    run.resume(engine)

    def inputs_through(transform: ImageTransform) -> InputSettings:
        return InputSettings(tokenizer, settings.data.max_text_tokens, transform, settings.run.seed)

    data = settings.data
    trained = inputs_through(ImageTransform(image_size, data.augment, data.crop_scale, data.reduced_decode))
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
        held_out = HeldOut(
            val_index, inputs_through(ImageTransform(image_size)), world, batch.micro_batch, settings.data.reader
        )
        evaluation = _evaluation(settings, task, engine, run, held_out)
    with closing(run):
        Trainer(settings, process, run, engine, loader, evaluation, throughput).train()


def _model_config(settings: FinetuneConfig, task: Task, fresh: str) -> Unimo3Config:
    """The model of the run.

    Raises:
        ConfigError: the weights do not fit the task.
    """
    model_config = config_of(settings.init, settings.run.folder)
    resized(model_config, settings.image_size)
    task.configure(model_config)
    model_config.architectures = [task.architecture]
    # What a run or an object store has is exported or copied first, by all ranks; a run that continues has its own.
    is_exported = run_of(settings.init) is None and not is_store(settings.init)
    if not has_begun(settings.run.folder) and is_exported:
        errors = exported_errors(settings.init, task.model_class(), model_config, fresh)
        if errors:
            raise ConfigError(errors)
    return model_config


def _build_engine(
    settings: FinetuneConfig, task: Task, model_config: Unimo3Config, ds_config: dict[str, Any], fresh: str
) -> Engine:
    # If a run continues, the checkpoint has all weights.
    begins = broadcast_object(not has_begun(settings.run.folder))
    weights = weights_of(settings.init, settings.run.folder, newest=settings.eval_only) if begins else ""
    training, model_class = settings.training, task.model_class()
    model = build_model(ds_config, lambda: model_class(model_config))
    initialize_weights(model, settings.run.seed, model_config.initializer_range)
    if weights:
        load_exported(model, weights, fresh=fresh)
    prepare_layers(model, settings.kernels, training.activation_checkpointing, training.compile_towers)
    return build_engine(task.objective(model), model, ds_config, settings.optim)


def _evaluation(settings: FinetuneConfig, task: Task, engine: Engine, run: Run, held_out: HeldOut) -> Evaluation:
    index, world = held_out.shards, held_out.world

    def evaluate(step: int, guard: Guard) -> dict[str, float] | None:
        results = task.evaluate(engine, held_out, guard)
        if results is None:
            return None
        written = write_files(run.folder, results.files, index.split, index.fingerprint)
        if world.rank == 0:
            kind = "metrics and answers" if results.metrics else "answers"
            log.info("%s for %s: %s", kind, index.split, ", ".join(map(str, written)))
        return results.metrics

    chooses_on = None if settings.eval_only or is_test_split(index.split) else index.fingerprint
    best = None
    if settings.best.keep:
        best = Best(settings.best, task.best_metric, chooses_on, settings.training.eval_every)

    def pictures(guard: Guard) -> "dict[str, Image]":
        samples, tokenizer = task.samples(index, held_out.input_settings), held_out.input_settings.tokenizer
        return sample_pictures(engine, samples, world, tokenizer, guard, functools.partial(task.describe, engine))

    return Evaluation(index.fingerprint, evaluate, index.split, best, pictures)
