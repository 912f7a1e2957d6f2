"""What a rank of a pretraining run does, from its settings to its last checkpoint.

Source: nanoGPT and lingua for one program that reads setup -> build -> loop.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from pretrain.plan import pretraining_step
from unimo3.checkpoint.export import data_of
from unimo3.checkpoint.initial_weights import has_begun, weights_of
from unimo3.data.index import ShardIndex, source_names
from unimo3.data.samples import PretrainSamples
from unimo3.data.shard_checks import check_same_indexes
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform, image_processor
from unimo3.distributed import broadcast_object
from unimo3.model.args import set_initial_weights
from unimo3.model.processor import Unimo3Processor
from unimo3.model.tokenizer_checks import resolve_tokens
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.objectives.base import PretrainingLoss
from unimo3.training.ds_config import read_ds_config
from unimo3.training.engine import build_engine, build_model, prepare_layers
from unimo3.training.evaluation import Evaluation, held_out_losses
from unimo3.training.nvme import swap_folder
from unimo3.training.process import start_process
from unimo3.training.run import Run
from unimo3.training.sample_pictures import sample_pictures
from unimo3.training.throughput import count_operations
from unimo3.training.trainer import Trainer

if TYPE_CHECKING:
    from pretrain.train import PretrainConfig


def pretrain(settings: PretrainConfig) -> None:
    """Train until done; every rank calls it.

    Raises:
        Interrupted: asked to stop; a checkpoint has been saved.
        Unimo3Error: see `Trainer.train`.
    """
    tokenizer = load_tokenizer(settings.data.tokenizer)
    model_config = settings.model_in_run().to_config()
    resolve_tokens(model_config, tokenizer)
    # Programs that load the exported folder truncate texts where this run does.
    tokenizer.model_max_length = settings.data.max_text_tokens
    model_config.architectures = [Unimo3ForPreTraining.__name__]
    indexes, val_index = settings.data.open_train(), settings.data.open_val()
    image_size = model_config.vision_config.image_size
    settings.data.check_limits(settings.training.micro_batch, image_size, num_images=1)
    process = start_process(settings.run, settings.training.stall_after_s)
    world = process.world
    check_same_indexes(indexes, val_index)

    batch = settings.batch_plan(world.size)
    swap = swap_folder(settings.training.nvme_path, settings.run.folder)
    ds_config = read_ds_config(settings.training.ds_config, batch, settings.optim.clip_norm, swap)
    throughput = count_operations(
        lambda: pretraining_step(
            model_config, settings.objectives, settings.data.max_text_tokens, settings.kernels, settings.optim
        ),
        ds_config,
        world,
    )
    model = build_model(ds_config, lambda: Unimo3ForPreTraining(model_config))
    initial_weights = _initial_weights(settings)
    set_initial_weights(model, replace(settings.model, init=initial_weights), settings.run.seed)
    task = PretrainingLoss(model, settings.objectives.build(settings.run.seed), source_names(indexes))
    training = settings.training
    prepare_layers(model, settings.kernels, training.activation_checkpointing, training.compile_towers)
    engine = build_engine(task, model, ds_config, settings.optim)
    data = settings.data
    init_data = data_of(initial_weights) if initial_weights else None
    run = Run(settings, batch.global_batch, data.fingerprint(indexes), data.facts(indexes), init_data)
    run.write_model_files(model_config, Unimo3Processor(image_processor(image_size), tokenizer))
    run.resume(engine)

    def samples_of(index: ShardIndex, transform: ImageTransform) -> PretrainSamples:
        probability = settings.objectives.mlm.probability
        return PretrainSamples(
            index, tokenizer, settings.data.max_text_tokens, transform, probability, settings.run.seed
        )

    augmented = ImageTransform(image_size, data.augment, data.crop_scale, data.reduced_decode)
    sources = [samples_of(index, augmented) for index in indexes]
    loader = settings.data.training_loader(
        sources, batch.global_batch, batch.micro_batch, world.rank, world.size, settings.run.seed, run.step
    )
    reader = settings.data.reader
    evaluation = None
    if val_index is not None:
        held_out = samples_of(val_index, ImageTransform(image_size))
        evaluation = Evaluation(
            val_index.fingerprint,
            lambda step, guard: held_out_losses(engine, held_out, world, batch.micro_batch, reader, guard),
            pictures=lambda guard: sample_pictures(engine, held_out, world, tokenizer, guard),
        )
    # The contrast of one micro-step over all ranks is already that of the step.
    contrasts_step = settings.objectives.contrasts_step and batch.num_accumulation > 1
    prepare_step = partial(task.prepare_step, run=engine) if contrasts_step else None
    with closing(run):
        Trainer(settings, process, run, engine, loader, evaluation, throughput, prepare_step).train()


def _initial_weights(settings: PretrainConfig) -> str | None:
    """Folder of the complete model's weights to start from; none in a run that has checkpoints of its own."""
    run, init = settings.run.folder, settings.model.init
    begins = broadcast_object(not has_begun(run))
    return weights_of(init, run, field="model.init") if init and begins else None
