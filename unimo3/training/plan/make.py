"""A run to be planned, and its plan on a machine.

Source: none.
"""

from dataclasses import dataclass, field, replace

import torch

from unimo3.errors import ConfigError
from unimo3.project_files import project_file
from unimo3.training.args import TrainingArgs
from unimo3.training.ds_config import DS_CONFIGS, BatchPlan, read_ds_config
from unimo3.training.plan.estimate import Machine, choose, fit, unsuited
from unimo3.training.plan.memory import Sharding, model_sizes
from unimo3.training.plan.report import Metrics, plan_metrics
from unimo3.training.plan.step_trace import Step, StepCost, trace_step


@dataclass(frozen=True)
class PlannedRun:
    """What of a run's settings decides its plan.

    Attributes:
        step: what it computes.
        training: its length, batch and ds_config.
        clip_norm: of its gradients.
        contrasts: whether its loss compares the pairs of a micro-step; see `BatchPlan`.
        words: entries of the plan that name what is counted; see `plan_text`.
    """

    step: Step
    training: TrainingArgs
    clip_norm: float
    contrasts: bool
    words: Metrics = field(default_factory=dict)


def make_plan(run: PlannedRun, machine: Machine, ds_config: str | None, compares: bool = True) -> Metrics:
    """The plan, see `plan_metrics`.

    Args:
        ds_config: path of the only one to consider; None: the run's and those that come with the project.
        compares: whether the run is planned with and without activation checkpointing; else only as it is.

    Raises:
        ConfigError: the global batch does not divide over the GPUs, or no micro-batch fits that training accepts.
    """
    training = run.training
    errors = BatchPlan(training.global_batch, 1, machine.num_gpus).validate()
    batch = BatchPlan(training.global_batch, training.micro_batch, machine.num_gpus, run.contrasts)
    if training.global_batch == 1:
        errors += replace(batch, micro_batch=1).contrast_errors()
    if errors:
        raise ConfigError(errors)
    ds_path = project_file(training.ds_config)
    candidates = {path.name: path for path in sorted(DS_CONFIGS.glob("*.json"))}
    # The recipe's may be in another folder; its path distinguishes it from one of ours with the same name.
    recipe_name = next((name for name, path in candidates.items() if path.resolve() == ds_path.resolve()), str(ds_path))
    # It comes first where two do equally well.
    candidates = {recipe_name: ds_path} if ds_config else {recipe_name: ds_path} | candidates
    shardings = {name: Sharding(read_ds_config(str(path), batch, run.clip_norm)) for name, path in candidates.items()}
    refused = {}
    if ds_config is None:
        refused = {name: why for name, sharding in shardings.items() if (why := unsuited(sharding, machine.num_gpus))}
    suited = {name: sharding for name, sharding in shardings.items() if name not in refused}

    sizes = model_sizes(run.step.build(), run.step.optim)
    checkpointing = training.activation_checkpointing
    costs: dict[torch.dtype, dict[bool, StepCost]] = {
        dtype: {on: trace_step(run.step, dtype, on) for on in ((False, True) if compares else (checkpointing,))}
        for dtype in {sharding.dtype for sharding in suited.values()}
    }
    fits = [
        fit(name, sharding, sizes, costs[sharding.dtype][checkpointing], batch, machine)
        for name, sharding in suited.items()
    ]
    choice = choose(fits, batch, machine)
    choice.reasons.update(refused)
    chosen_costs = costs[choice.fit.sharding.dtype]
    recipe_ds_config = None if ds_config else recipe_name
    metrics = plan_metrics(sizes, chosen_costs, checkpointing, choice, recipe_ds_config, batch, training.steps, machine)
    return run.words | metrics
