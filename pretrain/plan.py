"""What a pretraining recipe needs, before you request nodes: memory, micro-batch, ds_config, operations and hours.

Everything is computed from the recipe's model without values; no GPU and no data are needed.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.train import PretrainConfig
from unimo3 import config
from unimo3.data.masking import IGNORED
from unimo3.errors import exit_with_status
from unimo3.kernels.args import KernelArgs
from unimo3.objectives.args import ObjectivesArgs
from unimo3.training.args import OptimArgs
from unimo3.training.plan.command import machine_parser, print_plan
from unimo3.training.plan.settings import PlannedData, PlannedTraining

if TYPE_CHECKING:
    from unimo3.model.config import Unimo3Config
    from unimo3.model.unimo3 import Unimo3ForPreTraining
    from unimo3.objectives.base import PretrainingLoss
    from unimo3.training.plan.make import PlannedRun
    from unimo3.training.plan.step_trace import Batch, Step


@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """All settings of a planned pretraining run."""

    data: PlannedData = field(default_factory=PlannedData)
    training: PlannedTraining = field(default_factory=PlannedTraining)

    def quick_errors(self) -> list[str]:
        """Return none: the shards are not read."""
        return []

    def slow_errors(self) -> list[str]:
        """Return where model, tokenizer, length of texts and frozen parts do not fit together, one line per error."""
        settings = self.model_in_run()
        if settings.validate():
            return []  # the model group reports it
        from unimo3.training.parts import freeze_errors

        model = settings.to_config()
        return self.data.model_errors(model) + freeze_errors(model, self.optim)


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Command line, and the settings on it; see ``--help``."""
    parser = machine_parser(
        "python -m pretrain.plan",
        __doc__,
        "All other arguments are those of pretrain.train: --config FILE and --group.key value.",
    )
    parser.add_argument("--table", nargs="+", type=Path, metavar="RECIPE", help="print the table of sizes of recipes")
    return parser.parse_known_args(argv)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Plan, and print it."""
    args, rest = parse_arguments(argv)
    if args.table:
        from unimo3.training.plan.table import sizes_table

        recipes = {path.stem: recipe_of(parse_settings(["--config", str(path), *rest])) for path in args.table}
        print(sizes_table(recipes))
        return
    print_plan(args, rest, read_run)


def read_run(argv: list[str]) -> "PlannedRun":
    """The run that settings describe."""
    settings = parse_settings(argv)
    from unimo3.training.plan.make import PlannedRun

    contrasts = settings.objectives.contrasts
    return PlannedRun(recipe_of(settings), settings.training, settings.optim.clip_norm, contrasts)


def parse_settings(argv: list[str]) -> PlanConfig:
    """The settings of the run."""
    return config.parse(PlanConfig, argv, "python -m pretrain.plan", __doc__ or "")


def recipe_of(settings: PlanConfig) -> "Step":
    """What of the settings decides sizes."""
    model = settings.model_in_run().to_config()
    return pretraining_step(model, settings.objectives, settings.data.max_text_tokens, settings.kernels, settings.optim)


def pretraining_step(
    model: "Unimo3Config", objectives: ObjectivesArgs, num_tokens: int, kernels: KernelArgs, optim: OptimArgs
) -> "Step":
    """A step with all objectives.

    Args:
        num_tokens: T; texts are counted at full length.
    """
    import torch

    from unimo3.model.unimo3 import Unimo3ForPreTraining
    from unimo3.objectives.base import PretrainingLoss
    from unimo3.training.plan.step_trace import Step, blank_inputs

    def batch(num_pairs: int) -> "Batch":
        inputs = blank_inputs(model, num_pairs, num_tokens)
        labels = torch.full((num_pairs * num_tokens,), IGNORED)
        # <s> and </s> are never predicted; at least one token of a text is.
        num_masked = max(1.0, objectives.mlm.probability * (num_tokens - 2))
        labels[: round(num_pairs * num_masked)] = 0
        return inputs | {
            "mlm_input_ids": inputs["input_ids"],
            "mlm_labels": labels.view(num_pairs, num_tokens),
            "image_id": torch.arange(num_pairs),
            "positions": torch.arange(num_pairs),
        }

    def objective(model: "Unimo3ForPreTraining") -> "PretrainingLoss":
        return PretrainingLoss(model, objectives.build(seed=0))

    def prepare(task: "PretrainingLoss", batches: "list[Batch]") -> "list[Batch]":
        return task.prepare_step(batches, run=task)

    return Step(
        model, Unimo3ForPreTraining, objective, batch, kernels, optim, prepare if objectives.contrasts_step else None
    )


if __name__ == "__main__":
    main()
