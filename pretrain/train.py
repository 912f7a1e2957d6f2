"""Pretraining: shards -> sharded checkpoints. Started once a rank; starting it again resumes."""

from dataclasses import dataclass, field

from unimo3 import config
from unimo3.checkpoint.args import CheckpointArgs
from unimo3.data.args import DataArgs
from unimo3.data.index import ShardIndex
from unimo3.data.loader import Loader
from unimo3.data.order import SampleOrder
from unimo3.data.samples import PretrainSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import image_processor
from unimo3.distributed import world_size_from_environment
from unimo3.errors import exit_with_status
from unimo3.model.args import ModelArgs
from unimo3.model.init import initialize_weights
from unimo3.model.pretrained import load_clip, load_roberta
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.objectives.args import ObjectivesArgs
from unimo3.objectives.base import PretrainingTask
from unimo3.training.engine import BatchPlan, build_engine, build_model, read_ds_config
from unimo3.training.loop import TrainingArgs, train
from unimo3.training.optim import OptimArgs
from unimo3.training.run import Run, RunArgs
from unimo3.training.start import start_process


@dataclass(frozen=True)
class PretrainConfig:
    """All settings of a pretraining run."""

    run: RunArgs = field(default_factory=RunArgs)
    model: ModelArgs = field(default_factory=ModelArgs)
    data: DataArgs = field(default_factory=DataArgs)
    objectives: ObjectivesArgs = field(default_factory=ObjectivesArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    training: TrainingArgs = field(default_factory=TrainingArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)

    def faults(self) -> list[str]:
        """Say which settings do not fit together, one line a fault."""
        found = self.batch_plan(world_size_from_environment()).faults()
        found += text_length_faults(self.data.max_text_tokens, self.model.text.max_position_embeddings)
        return found

    def batch_plan(self, world_size: int) -> BatchPlan:
        """How the global batch is spread over `world_size` ranks."""
        return BatchPlan(self.training.global_batch, self.training.micro_batch, world_size)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Train until done, interrupted or in error; see unimo3/errors.py for the exit status."""
    settings = config.parse(PretrainConfig, argv, "python -m pretrain.train", __doc__ or "")
    tokenizer = load_tokenizer(settings.data.tokenizer)
    model_config = fit_to_tokenizer(settings.model.to_config(), tokenizer)
    index = ShardIndex.load(settings.data.train)
    world, stop = start_process(settings.run.seed)

    batch = settings.batch_plan(world.size)
    run = Run(settings, batch.global_batch, index.fingerprint)
    run.write_model_files(model_config, tokenizer, image_processor(model_config.vision_config.image_size))

    ds_config = read_ds_config(settings.training.ds_config, batch, settings.optim.clip_norm)
    model = build_model(ds_config, lambda: Unimo3ForPreTraining(model_config))
    initialize_weights(model, settings.run.seed, model_config.initializer_range)
    if settings.model.text.init:
        load_roberta(model.unimo3.text_tower, settings.model.text.init)
    if settings.model.vision.init:
        load_clip(model.unimo3.vision_tower.vit, settings.model.vision.init)
    task = PretrainingTask(model, settings.objectives.build(settings.run.seed))
    engine = build_engine(task, model, ds_config, settings.optim)

    run.resume(engine)
    samples = PretrainSamples()
    loader = Loader()
    train(run, engine, loader, settings.training, settings.optim, settings.checkpoint, stop)
    run.close()


if __name__ == "__main__":
    main()
