"""What a pretraining recipe needs, before a node is booked: memory, micro-batch, ds_config, operations and hours.

Everything is computed from the recipe's own model without values; no GPU and no data are needed.
"""

import argparse
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pretrain.train import PretrainConfig
from unimo3 import config
from unimo3.data.args import DataArgs
from unimo3.data.tokenizer import load_tokenizer
from unimo3.errors import CommandParser, ConfigError, exit_with_status
from unimo3.model.args import tokenizer_faults
from unimo3.training.engine import BatchPlan, read_ds_config
from unimo3.training.loop import TrainingArgs
from unimo3.training.plan.estimate import Machine, choose, fit, unsuited
from unimo3.training.plan.memory import Sharding, model_sizes
from unimo3.training.plan.report import Figures, plan_figures, plan_text
from unimo3.training.plan.table import Recipe, sizes_table
from unimo3.training.plan.trace import StepCost, build_on_meta, trace_step

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
# Of one H100 SXM, without sparsity; torch multiplies float32 as such, not as TF32.
_H100_TFLOPS = {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0}


@dataclass(frozen=True)
class PlannedData(DataArgs):
    """Data that need not exist yet."""

    def faults(self) -> list[str]:
        """As when training, but for a tokenizer that is not there."""
        found = super().faults()
        return found if _exists(self.tokenizer) else [line for line in found if not line.startswith("data.tokenizer:")]


@dataclass(frozen=True)
class PlannedTraining(TrainingArgs):
    """A training that takes place on another machine."""

    def faults(self) -> list[str]:
        """As when training, but for what this machine lacks."""
        return [line for line in super().faults() if "fp16 needs a GPU" not in line]


@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """All settings of a pretraining run that is yet to come."""

    data: PlannedData = field(default_factory=PlannedData)
    training: PlannedTraining = field(default_factory=PlannedTraining)

    def faults(self) -> list[str]:
        """Say which settings do not fit together, one line a fault; nothing is asked of the shards."""
        if self.training.micro_batch < 1:
            return [f"training.micro_batch: {self.training.micro_batch}: at least 1 pair is needed"]
        if not _exists(self.data.tokenizer) or self.model.faults() or self.data.faults():
            return []
        tokenizer = load_tokenizer(self.data.tokenizer)
        return tokenizer_faults(self.model.text.to_config(), tokenizer, self.data.max_text_tokens)


def _exists(folder: str) -> bool:
    return bool(folder) and Path(folder).is_dir()


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Command line, and the settings on it; see ``--help``."""
    parser = CommandParser(
        prog="python -m pretrain.plan",
        description=__doc__,
        allow_abbrev=False,
        epilog="All other arguments are those of pretrain.train: --config FILE and --group.key value.",
    )
    parser.add_argument("--gpus", type=int, help="GPUs of all nodes, one rank each")
    parser.add_argument("--gpu-memory", default="80GB", help="of one GPU, such as 80GB or 40GiB (default: %(default)s)")
    parser.add_argument(
        "--reserve", type=float, default=0.1,
        help="share of it to stay free, for CUDA, NCCL and fragmentation (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ds-config", help="the only DeepSpeed configuration to consider (default: all of ds_configs/)"
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4,
        help="share of the peak that a step reaches, recomputation counted as work (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--peak-tflops", type=float,
        help="of one GPU, 10^12 operations a second (default: an H100's, 989 in bf16 and fp16, 67 in fp32)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, in bytes, operations and seconds")
    parser.add_argument("--table", nargs="+", type=Path, metavar="RECIPE", help="print the table of sizes of recipes")
    return parser.parse_known_args(argv)


def machine_of(args: argparse.Namespace) -> Machine:
    """The machine that the arguments describe.

    Raises:
        ConfigError: an argument is missing or out of range.
    """
    found = []
    if args.gpus is None:
        found.append("--gpus: not given; say how many GPUs the run is to have")
    elif args.gpus < 1:
        found.append(f"--gpus {args.gpus}: at least 1 is needed")
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", args.gpu_memory.strip().upper())
    unit = _UNITS.get(size[2]) if size else None
    if size is None or unit is None or float(size[1]) == 0:
        found.append(f"--gpu-memory {args.gpu_memory}: a size such as 80GB, 80GiB or 40000MB is needed")
    if not 0 <= args.reserve < 1:
        found.append(f"--reserve {args.reserve}: a share of at least 0 and below 1 is needed")
    if not 0 < args.mfu <= 1:
        found.append(f"--mfu {args.mfu}: a share above 0 and at most 1 is needed")
    if args.peak_tflops is not None and not 0 < args.peak_tflops < math.inf:
        found.append(f"--peak-tflops {args.peak_tflops}: a number above 0 is needed")
    if found:
        raise ConfigError(found)
    assert size is not None
    assert unit is not None
    peaks = {precision: (args.peak_tflops or peak) * 1e12 for precision, peak in _H100_TFLOPS.items()}
    return Machine(args.gpus, int(float(size[1]) * unit), args.reserve, peaks, args.mfu)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Plan, and print it."""
    args, rest = parse_arguments(argv)
    if args.table:
        recipes = {path.stem: recipe_of(parse_settings(["--config", str(path), *rest])) for path in args.table}
        print(sizes_table(recipes))
        return
    if args.ds_config is not None:
        rest += ["--training.ds_config", args.ds_config]  # checked with the rest
    faults = []
    try:
        machine = machine_of(args)
    except ConfigError as error:
        faults += error.faults
    try:
        settings = parse_settings(rest)
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    plan = make_plan(settings, machine, args.ds_config)
    print(json.dumps(plan, indent=2) if args.json else plan_text(plan))


def parse_settings(argv: list[str]) -> PlanConfig:
    """The settings of the run."""
    return config.parse(PlanConfig, argv, "python -m pretrain.plan", __doc__ or "")


def recipe_of(settings: PlanConfig) -> Recipe:
    """What of the settings decides sizes."""
    return Recipe(settings.model.to_config(), settings.objectives, settings.data.max_text_tokens, settings.kernels)


def make_plan(settings: PlanConfig, machine: Machine, ds_config: str | None) -> Figures:
    """The plan, see `plan_figures`.

    Args:
        ds_config: path of the only one to consider; None: those of ds_configs/.

    Raises:
        ConfigError: the global batch does not divide over the GPUs, or not even one pair fits.
    """
    training = settings.training
    if faults := BatchPlan(training.global_batch, 1, machine.num_gpus).faults():
        raise ConfigError(faults)
    batch = settings.batch_plan(machine.num_gpus)
    own = Path(training.ds_config)
    candidates = {path.name: path for path in sorted(DS_CONFIGS.glob("*.json"))}
    # The recipe's may be from elsewhere; a path tells it from one of ours with the same name.
    own_name = next((name for name, path in candidates.items() if path.resolve() == own.resolve()), str(own))
    # It comes first where two do equally well.
    candidates = {own_name: own} if ds_config else {own_name: own} | candidates
    shardings = {
        name: Sharding(read_ds_config(str(path), batch, settings.optim.clip_norm)) for name, path in candidates.items()
    }
    refused = {}
    if ds_config is None:
        refused = {name: why for name, found in shardings.items() if (why := unsuited(found, machine.num_gpus))}
    suited = {name: sharding for name, sharding in shardings.items() if name not in refused}

    recipe = recipe_of(settings)
    sizes = model_sizes(build_on_meta(recipe.model))
    costs: dict[torch.dtype, dict[bool, StepCost]] = {
        dtype: {
            on: trace_step(recipe.model, recipe.objectives, recipe.num_tokens, dtype, on, recipe.kernels)
            for on in (False, True)
        }
        for dtype in {sharding.dtype for sharding in suited.values()}
    }
    checkpointing = training.activation_checkpointing
    fits = [
        fit(name, sharding, sizes, costs[sharding.dtype][checkpointing], batch, machine)
        for name, sharding in suited.items()
    ]
    choice = choose(fits, batch, machine)
    choice.reasons.update(refused)
    own_costs = costs[choice.fit.sharding.dtype]
    recipes_own = None if ds_config else own_name
    return plan_figures(sizes, own_costs, checkpointing, choice, recipes_own, batch, training.steps, machine)


if __name__ == "__main__":
    main()
