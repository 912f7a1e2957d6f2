"""Pretraining: shards -> sharded checkpoints. Started once a rank; starting it again resumes."""

from dataclasses import dataclass, field

from unimo3 import config
from unimo3.checkpoint.args import CheckpointArgs
from unimo3.config import Checked
from unimo3.data.args import DataArgs
from unimo3.data.tokenizer import load_tokenizer
from unimo3.distributed import world_size_from_environment
from unimo3.errors import ConfigError, exit_with_status
from unimo3.kernels.args import KernelArgs
from unimo3.model.args import ModelArgs, tokenizer_errors
from unimo3.objectives.args import ObjectivesArgs
from unimo3.training.args import OptimArgs, TrainingArgs
from unimo3.training.ds_config import BatchPlan
from unimo3.training.run import RunArgs, changed_settings


@dataclass(frozen=True)
class PretrainConfig(Checked):
    """All settings of a pretraining run."""

    run: RunArgs = field(default_factory=RunArgs)
    model: ModelArgs = field(default_factory=ModelArgs)
    data: DataArgs = field(default_factory=DataArgs)
    objectives: ObjectivesArgs = field(default_factory=ObjectivesArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    training: TrainingArgs = field(default_factory=TrainingArgs)
    kernels: KernelArgs = field(default_factory=KernelArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)

    def quick_errors(self) -> list[str]:
        """Return which settings do not fit together or the shards, one line per error."""
        errors = self.batch_plan(world_size_from_environment()).validate() + changed_settings(self)
        return errors + self.data.shard_errors("captions", self.training.num_samples)

    def slow_errors(self) -> list[str]:
        """Return where the tokenizer or ``optim.freeze`` does not fit the model, one line per error."""
        if self.model.validate():
            return []  # the model group reports it
        from unimo3.training.parts import freeze_errors

        model = self.model.to_config()
        errors = freeze_errors(model, self.optim)
        try:
            tokenizer = load_tokenizer(self.data.tokenizer)
        except ConfigError:
            return errors  # the data group reports it
        is_trained = bool(self.model.init or self.model.text.init)
        errors += tokenizer_errors(model.text_config, tokenizer, self.data.max_text_tokens, is_trained)
        return errors + self.data.text_errors(tokenizer, "captions")

    def batch_plan(self, world_size: int) -> BatchPlan:
        """How the global batch is spread over `world_size` ranks."""
        return BatchPlan(
            self.training.global_batch, self.training.micro_batch, world_size, contrasts=self.objectives.contrasts
        )


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Train until done, interrupted or in error; unimo3/errors.py lists the exit statuses."""
    settings = config.parse(PretrainConfig, argv, "python -m pretrain.train", __doc__ or "")
    from pretrain.program import pretrain

    pretrain(settings)


if __name__ == "__main__":
    main()
