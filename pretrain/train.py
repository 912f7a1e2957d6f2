"""Pretraining: shards -> sharded checkpoints. Started once a rank; starting it again resumes."""

from contextlib import closing
from dataclasses import dataclass, field

from unimo3 import config
from unimo3.checkpoint.args import CheckpointArgs
from unimo3.data.args import DataArgs
from unimo3.data.index import ShardIndex
from unimo3.data.samples import PretrainSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import Augment, ImageTransform, image_processor
from unimo3.distributed import world_size_from_environment
from unimo3.errors import ConfigError, exit_with_status
from unimo3.kernels.args import KernelArgs
from unimo3.model.args import ModelArgs, resolve_tokens, set_initial_weights, tokenizer_errors
from unimo3.model.processor import Unimo3Processor
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.objectives.args import ObjectivesArgs
from unimo3.objectives.base import PretrainingTask
from unimo3.training.args import TrainingArgs
from unimo3.training.engine import BatchPlan, build_engine, build_model, prepare_layers, read_ds_config
from unimo3.training.evaluation import Evaluation, held_out_losses
from unimo3.training.optim import OptimArgs
from unimo3.training.run import Run, RunArgs, changed_settings
from unimo3.training.start import start_process
from unimo3.training.trainer import Trainer


@dataclass(frozen=True)
class PretrainConfig:
    """All settings of a pretraining run."""

    run: RunArgs = field(default_factory=RunArgs)
    model: ModelArgs = field(default_factory=ModelArgs)
    data: DataArgs = field(default_factory=DataArgs)
    objectives: ObjectivesArgs = field(default_factory=ObjectivesArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    training: TrainingArgs = field(default_factory=TrainingArgs)
    kernels: KernelArgs = field(default_factory=KernelArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)

    def validate(self) -> list[str]:
        """Return which settings do not fit together, one line per error."""
        errors = self.batch_plan(world_size_from_environment()).validate() + changed_settings(self)
        if self.objectives.itc.weight > 0 or self.objectives.itm.weight > 0:
            errors += self.batch_plan(world_size_from_environment()).contrast_errors()
        errors += self.data.shard_errors("captions")
        if self.model.validate():
            return errors  # the model group reports it
        try:
            tokenizer = load_tokenizer(self.data.tokenizer)
        except ConfigError:
            return errors  # the data group reports it
        text = self.model.to_config().text_config
        is_trained = bool(self.model.init or self.model.text.init)
        return errors + tokenizer_errors(text, tokenizer, self.data.max_text_tokens, is_trained)

    def batch_plan(self, world_size: int) -> BatchPlan:
        """How the global batch is spread over `world_size` ranks."""
        return BatchPlan(self.training.global_batch, self.training.micro_batch, world_size)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Train until done, interrupted or in error; unimo3/errors.py lists the exit statuses."""
    settings = config.parse(PretrainConfig, argv, "python -m pretrain.train", __doc__ or "")
    tokenizer = load_tokenizer(settings.data.tokenizer)
    model_config = settings.model.to_config()
    resolve_tokens(model_config, tokenizer)
    # Programs that load the exported folder truncate texts where this run does.
    tokenizer.model_max_length = settings.data.max_text_tokens
    model_config.architectures = [Unimo3ForPreTraining.__name__]
    indexes, val_index = settings.data.open_train(), settings.data.open_val()
    process = start_process(settings.run, settings.training.stall_after_s)
    world = process.world

    batch = settings.batch_plan(world.size)
    image_size = model_config.vision_config.image_size

    ds_config = read_ds_config(settings.training.ds_config, batch, settings.optim.clip_norm)
    model = build_model(ds_config, lambda: Unimo3ForPreTraining(model_config))
    set_initial_weights(model, settings.model, settings.run.seed)
    task = PretrainingTask(model, settings.objectives.build(settings.run.seed))
    training = settings.training
    prepare_layers(model, settings.kernels, training.activation_checkpointing, training.compile_towers)
    engine = build_engine(task, model, ds_config, settings.optim)
    run = Run(settings, batch.global_batch, settings.data.fingerprint(indexes))
    run.write_model_files(model_config, Unimo3Processor(image_processor(image_size), tokenizer))
    run.resume(engine)

    def samples_of(index: ShardIndex, augment: Augment, crop_scale: float) -> PretrainSamples:
        transform = ImageTransform(image_size, augment, crop_scale)
        probability = settings.objectives.mlm.probability
        return PretrainSamples(
            index, tokenizer, settings.data.max_text_tokens, transform, probability, settings.run.seed
        )

    sources = [samples_of(index, settings.data.augment, settings.data.crop_scale) for index in indexes]
    loader = settings.data.training_loader(
        sources, batch.global_batch, batch.micro_batch, world.rank, world.size, settings.run.seed, run.step
    )
    reader = settings.data.reader
    evaluation = None
    if val_index is not None:
        held_out = samples_of(val_index, "none", 1.0)
        evaluation = Evaluation(
            val_index.fingerprint,
            lambda step, guard: held_out_losses(engine, held_out, world, batch.micro_batch, reader, guard),
        )
    with closing(run):
        Trainer(settings, process, run, engine, loader, evaluation).train()


if __name__ == "__main__":
    main()
