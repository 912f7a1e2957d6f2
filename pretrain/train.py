"""Pretraining: shards -> sharded checkpoints. Started once a rank; starting it again resumes."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from unimo3 import config
from unimo3.checkpoint.args import CheckpointArgs
from unimo3.checkpoint.initial_weights import has_begun, lacks_weights, model_files_of, tokenizer_of
from unimo3.config import Checked
from unimo3.data.args import DataArgs
from unimo3.data.tokenizer import load_tokenizer
from unimo3.distributed import world_size_from_environment
from unimo3.errors import ConfigError, exit_with_status
from unimo3.kernels.args import KernelArgs
from unimo3.model.args import ModelArgs, ModelOfRun, replaced_errors
from unimo3.model.tokenizer_checks import tokenizer_errors
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
        return errors + self.data.shard_errors(
            "captions", self.data.stream_length(self.training.steps, self.training.global_batch)
        )

    def checked_group(self, name: str) -> Any:
        """The model, with what it continues in this run; the other groups as they are."""
        return self.model_in_run() if name == "model" else super().checked_group(name)

    def model_in_run(self) -> ModelArgs:
        """The model's settings, `init` being the folder that has the configuration now.

        For a run that has begun that is its own, since what it started from may have been removed.
        """
        if not self.model.init:
            return self.model
        files = model_files_of(self.model.init, self.run.folder)
        settings = {of_model.name: getattr(self.model, of_model.name) for of_model in fields(ModelArgs)}
        has_none = lacks_weights(self.model.init, self.run.folder)
        return (ModelOfRun if has_none else ModelArgs)(**(settings | {"init": files}))

    def slow_errors(self) -> list[str]:
        """Return where tokenizer, initial weights or ``optim.freeze`` do not fit the model, one line per error."""
        settings = self.model_in_run()
        if settings.validate():
            return []  # the model group reports it
        from unimo3.training.parts import freeze_errors

        model = settings.to_config()
        errors = freeze_errors(model, self.optim)
        if settings.continues_unimo3 and not has_begun(self.run.folder):
            errors += replaced_errors(self.model, model)
        try:
            tokenizer = load_tokenizer(self.data.tokenizer)
        except ConfigError:
            return errors  # the data group reports it
        is_trained = bool(self.model.init or self.model.text.init)
        if settings.continues_unimo3:
            errors += _vocabulary_errors(self.model.init or "", self.run.folder, self.data.tokenizer)
        errors += tokenizer_errors(model.text_config, tokenizer, self.data.max_text_tokens, is_trained)
        return errors + self.data.text_errors(tokenizer, "captions")

    def batch_plan(self, world_size: int) -> BatchPlan:
        """How the global batch is spread over `world_size` ranks."""
        return BatchPlan(
            self.training.global_batch, self.training.micro_batch, world_size, contrasts=self.objectives.contrasts
        )


def _vocabulary_errors(init: str, run: Path, path: str) -> list[str]:
    """Return an error if a tokenizer has not the vocabulary of the weights that a run continues.

    Args:
        run: folder of the run.
        path: of the tokenizer.
    """
    try:
        trained = load_tokenizer(model_files_of(init, run))
    except ConfigError:
        return [f"model.init: '{init}': contains no tokenizer; name a folder that python -m pretrain.export wrote"]
    if trained.get_vocab() == load_tokenizer(path).get_vocab():
        return []
    return [
        f"data.tokenizer: '{path}': has another vocabulary than the weights of model.init were trained with; "
        f"use {tokenizer_of(init, run)}"
    ]


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Train until done, interrupted or in error; unimo3/errors.py lists the exit statuses."""
    settings = config.parse(PretrainConfig, argv, "python -m pretrain.train", __doc__ or "")
    from pretrain.program import pretrain

    pretrain(settings)


if __name__ == "__main__":
    main()
