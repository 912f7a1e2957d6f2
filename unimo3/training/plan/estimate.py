"""From what a model costs to what a run needs: the ds_config, the micro-batch and the hours.

Of the configurations that fit the recipe's micro-batch, the one that moves least between ranks is chosen: ZeRO-2
reduces gradients and gathers updated weights; ZeRO-3 also gathers weights in every pass, with hpZ from the GPUs of one
node alone; offloading also moves state over the host's bus, and to NVMe also to disks.

Source: ZeRO, arXiv 1910.02054, for the volumes; ZeRO++, arXiv 2306.10209, for hpZ.
"""

from dataclasses import dataclass, replace

from unimo3.errors import ConfigError
from unimo3.training.ds_config import BatchPlan
from unimo3.training.plan.memory import ModelSizes, RankMemory, Sharding, rank_memory
from unimo3.training.plan.settings import Machine
from unimo3.training.plan.step_trace import StepCost


@dataclass(frozen=True)
class Fit:
    """One ds_config on a machine.

    Attributes:
        name: of the file.
        needed_bytes: of GPU memory at the recipe's micro-batch.
        largest: micro-batch that fits; 0 if none does.
        largest_dividing: that also divides the global batch over the ranks.
        fits: whether the recipe's micro-batch does.
    """

    name: str
    sharding: Sharding
    memory: RankMemory
    needed_bytes: float
    largest: int
    largest_dividing: int
    fits: bool


@dataclass(frozen=True)
class PlanChoice:
    """The ds_config to take, its micro-batch, and why no other: a line for each by the file's name."""

    fit: Fit
    micro_batch: int
    reasons: dict[str, str]


def fit(name: str, sharding: Sharding, sizes: ModelSizes, cost: StepCost, batch: BatchPlan, machine: Machine) -> Fit:
    """Compute which micro-batches fit with a ds_config.

    Args:
        cost: with weights of the sharding's type.
        batch: of the recipe, over the machine's ranks.
    """
    memory = rank_memory(sizes, sharding, batch.world_size)
    rank_batch = batch.global_batch // batch.world_size

    def needed_bytes(micro_batch: int) -> float:
        return memory.peak_bytes(cost.activation_bytes(micro_batch, rank_batch))

    fitting = [
        size
        for size in range(1, rank_batch + 1)
        if needed_bytes(size) <= machine.usable_bytes and not replace(batch, micro_batch=size).contrast_errors()
    ]
    return Fit(
        name,
        sharding,
        memory,
        needed_bytes(batch.micro_batch),
        largest=max(fitting, default=0),
        largest_dividing=max((size for size in fitting if rank_batch % size == 0), default=0),
        fits=batch.micro_batch in fitting and not batch.validate(),
    )


def unsuited(sharding: Sharding, num_gpus: int) -> str:
    """Why a ds_config is out of question on GPUs whatever their memory; empty if it is not."""
    if sharding.precision == "fp32":
        return "for CPUs: GPUs multiply bf16 many times as fast"
    if sharding.precision == "fp16" and not sharding.quantizes:
        return "for GPUs without bf16: its loss scaling skips steps that overflow"
    if sharding.quantizes:
        return "rounds what ranks exchange to 8 or 4 bits: another training, for networks that are too slow"
    group = sharding.secondary_ranks
    if group > 1 and (num_gpus % group or num_gpus <= group):
        return f"keeps a copy of the weights on every {group} GPUs: for several nodes of {group}"
    return ""


def choose(fits: list[Fit], batch: BatchPlan, machine: Machine) -> PlanChoice:
    """Take the ds_config that communicates least among those that fit the recipe's micro-batch.

    If none does, the first that fits a smaller one is taken.

    Args:
        fits: of all configurations to choose from.

    Raises:
        ConfigError: not even the smallest micro-batch fits: one pair, or two where one has nothing to compare with.
    """
    ordered = sorted(fits, key=_traffic)
    fitting = [fit for fit in ordered if fit.fits] or [fit for fit in ordered if fit.largest_dividing]
    if not fitting:
        raise ConfigError(_impossible(ordered, batch, machine))
    taken = fitting[0]
    micro_batch = batch.micro_batch if taken.fits else taken.largest_dividing
    return PlanChoice(taken, micro_batch, {fit.name: _reason(fit, taken, batch, machine) for fit in ordered})


def _traffic(fit: Fit) -> tuple[int, int, bool]:
    sharding = fit.sharding
    return sharding.offloads + sharding.offloads_to_nvme, sharding.stage, sharding.secondary_ranks == 1


def _reason(fit: Fit, taken: Fit, batch: BatchPlan, machine: Machine) -> str:
    if fit is taken:
        return "fits, and moves the least" if fit.fits else f"fits with micro-batch {fit.largest_dividing}"
    if fit.needed_bytes > machine.usable_bytes:
        return (
            f"needs {gigabytes(fit.needed_bytes)} at micro-batch {batch.micro_batch}, "
            f"{gigabytes(machine.usable_bytes)} are usable"
        )
    if _traffic(fit) == _traffic(taken):
        return f"would fit, and moves as much as {taken.name}"
    if fit.sharding.offloads_to_nvme:
        return "would fit, but reads and writes the optimizer's states on NVMe in every step"
    if fit.sharding.offloads:
        return "would fit, but moves state between GPU and host in every step"
    if fit.sharding.stage == 3:
        return "would fit, but gathers the weights in every pass"
    return f"would fit, but moves no less than {taken.name}"


def _impossible(suited: list[Fit], batch: BatchPlan, machine: Machine) -> str:
    least = "one pair"
    if replace(batch, micro_batch=1).contrast_errors():
        least = "two pairs, or of more that divides training.global_batch,"
    states = ", ".join(f"{fit.name} {gigabytes(fit.memory.peak_bytes(0))}" for fit in suited)
    return (
        f"--gpu-memory {gigabytes(machine.memory_bytes)}: not even a micro-batch of {least} fits: of "
        f"{gigabytes(machine.usable_bytes)} usable a rank needs without any pair: {states}; take more or larger GPUs, "
        "a ds_config that offloads, set training.activation_checkpointing to true, or lower stage3_max_live_parameters "
        "and stage3_max_reuse_distance"
    )


def gigabytes(size: float) -> str:
    """Bytes as a text in units of 10^9."""
    return f"{size / 1e9:.1f} GB"
