"""A plan as plain metrics, for JSON, and as a text for readers."""

from dataclasses import asdict, replace
from typing import Any

from unimo3.training.ds_config import BatchPlan
from unimo3.training.plan.estimate import Machine, PlanChoice, gigabytes
from unimo3.training.plan.memory import ModelSizes
from unimo3.training.plan.network import network_s, step_traffic
from unimo3.training.plan.offload_traffic import offload_traffic
from unimo3.training.plan.step_trace import StepCost

Metrics = dict[str, Any]

_NOT_COUNTED = ["waiting for ranks and data"]


def plan_metrics(
    sizes: ModelSizes,
    costs: dict[bool, StepCost],
    activation_checkpointing: bool,
    choice: PlanChoice,
    recipe_ds_config: str | None,
    batch: BatchPlan,
    num_steps: int,
    machine: Machine,
) -> Metrics:
    """Everything in a plan, in bytes, operations and seconds.

    Args:
        costs: of a step in the chosen ds_config's precision, without and with activation checkpointing; or only as
            the run does it.
        recipe_ds_config: the candidate that the recipe names; None where another was requested.
    """
    cost, memory = costs[activation_checkpointing], choice.fit.memory
    rank_batch = batch.global_batch // batch.world_size
    activation_bytes = cost.activation_bytes(choice.micro_batch, rank_batch)
    prepare_flops = cost.prepare_flops_with(choice.micro_batch, rank_batch)
    precision = choice.fit.sharding.precision
    compute_s = machine.compute_s(batch.global_batch, prepare_flops + cost.flops, precision)
    num_micro_steps = rank_batch // choice.micro_batch
    traffic = step_traffic(sizes, choice.fit.sharding, num_micro_steps)
    between_s = network_s(traffic, machine)
    step_s = compute_s + between_s
    return {
        "machine": {
            "gpus": machine.num_gpus,
            "gpu_memory_bytes": machine.memory_bytes,
            "usable_bytes": int(machine.usable_bytes),
            "precision": precision,
            "peak_flops": machine.peak_flops[precision],
            "utilization": machine.utilization,
            "fabric": asdict(machine.fabric),
        },
        "parameters": {**sizes.roles, "total": sizes.total},
        "flops_per_pair": {
            "prepare": int(prepare_flops),
            "forward": int(cost.forward_flops),
            "backward": int(cost.backward_flops),
        },
        "ds_config": choice.fit.name,
        "recipe_ds_config": recipe_ds_config,
        "ds_config_reasons": choice.reasons,
        "activation_checkpointing": activation_checkpointing,
        "activation_bytes_per_pair": {
            "with_checkpointing" if on else "without_checkpointing": {
                "saved": int(costs[on].saved_bytes),
                "at_most": int(costs[on].peak_bytes),
            }
            for on in costs
        },
        "micro_batch": {
            "recipe": batch.micro_batch,
            "recipe_divides": not replace(batch, contrasts=False).validate(),
            "recipe_contrasts": not batch.contrast_errors(),
            "recipe_fits": choice.fit.fits,
            "recipe_fits_with_checkpointing": True in costs and _recipe_fits(choice, costs[True], batch, machine),
            "share": rank_batch,
            "largest": choice.fit.largest,
            "largest_dividing": choice.fit.largest_dividing,
            "planned": choice.micro_batch,
        },
        "rank_bytes": {
            "gpu": memory.device,
            "gpu_during_pass": memory.pass_bytes | {"activations": int(activation_bytes)},
            "gpu_during_optimizer_step": memory.step_bytes,
            "gpu_at_most": int(memory.peak_bytes(activation_bytes)),
            "host": memory.host,
            "nvme": memory.nvme,
        },
        "network_bytes": {
            "over_all": traffic.over_all,
            "within_node": traffic.within_node,
            "received_by_rank": int(traffic.received_bytes(machine.num_gpus)),
        },
        "offload_bytes": offload_traffic(sizes, choice.fit.sharding, num_micro_steps, machine.num_gpus),
        "time": {
            "compute_s": compute_s,
            "network_s": between_s,
            "step_s": step_s,
            "steps": num_steps,
            "network_hours": between_s * num_steps / 3600,
            "hours": step_s * num_steps / 3600,
        },
    }


def _recipe_fits(choice: PlanChoice, cost: StepCost, batch: BatchPlan, machine: Machine) -> bool:
    activation_bytes = cost.activation_bytes(batch.micro_batch, batch.global_batch // batch.world_size)
    needed_bytes = choice.fit.memory.peak_bytes(activation_bytes)
    return needed_bytes <= machine.usable_bytes and not batch.validate()


def plan_text(plan: Metrics) -> str:
    """The metrics of `plan_metrics` for readers.

    Args:
        plan: with ``unit``, what a pair is, and ``not_counted``, what else takes time, where they are not
            pretraining's.
    """
    machine, flops, unit = plan["machine"], plan["flops_per_pair"], plan.get("unit", "pair")
    usable = gigabytes(machine["usable_bytes"])
    lines = [
        f"{machine['gpus']} GPUs of {gigabytes(machine['gpu_memory_bytes'])}, {usable} of each usable",
        "parameters: " + ", ".join(f"{name} {count:,}" for name, count in plan["parameters"].items()),
        f"operations a {unit}: {_operations(flops)}",
        "",
        "ds_config",
    ]
    for name, reason in plan["ds_config_reasons"].items():
        note = " (the recipe's)" if name == plan["recipe_ds_config"] else ""
        lines.append(f"{'  * ' if name == plan['ds_config'] else '    '}{name:26}{reason}{note}")
    lines += ["", f"memory of a rank with {plan['ds_config']}, GB", *_memory_lines(plan["rank_bytes"], usable)]
    lines += ["", f"{f'activations a {unit}, MB':37}saved  at most at once"]
    for name, sizes in plan["activation_bytes_per_pair"].items():
        lines.append(f"    {name.replace('_', ' '):26}{sizes['saved'] / 1e6:12.1f}{sizes['at_most'] / 1e6:17.1f}")
    lines += ["", _micro_batch_line(plan["micro_batch"])]
    lines += [_network_line(machine, plan)] if machine["gpus"] > 1 else []
    lines += [_offload_line(plan["offload_bytes"])] if any(plan["offload_bytes"].values()) else []
    lines += [_time_line(machine, plan["time"], plan.get("not_counted", _NOT_COUNTED))]
    return "\n".join(lines)


def _operations(flops: Metrics) -> str:
    text = f"{flops['forward'] / 1e9:,.1f} GFLOP forward, {flops['backward'] / 1e9:,.1f} backward"
    return text + (f", {flops['prepare'] / 1e9:,.1f} before the first micro-step" if flops["prepare"] else "")


def _network_line(machine: Metrics, plan: Metrics) -> str:
    fabric = machine["fabric"]
    return (
        f"between ranks: a rank receives {plan['network_bytes']['received_by_rank'] / 1e9:.2f} GB a step; at "
        f"{fabric['node_bytes_s'] / 1e9:g} GB/s in a node of {fabric['gpus_per_node']} and "
        f"{fabric['network_bytes_s'] / 1e9:g} GB/s a GPU between nodes, {fabric['overlap']:.0%} of it hidden: "
        f"{plan['time']['network_s']:.3f} s a step"
    )


def _offload_line(sizes: Metrics) -> str:
    names = {"host": "main memory", "nvme": "NVMe"}
    moved = [f"{size / 1e9:.2f} GB to and from {names[name]}" for name, size in sizes.items() if size]
    return f"offloaded: a rank moves {' and '.join(moved)} a step; the time is not counted"


def _time_line(machine: Metrics, time: Metrics, not_counted: list[str]) -> str:
    peak = f"{machine['peak_flops'] / 1e12:,.0f} TFLOP/s in {machine['precision']}"
    return (
        f"time at {machine['utilization']:.0%} of {peak}: {time['step_s']:.2f} s a step, {time['hours']:,.1f} hours "
        f"for {time['steps']:,} steps; {', and '.join(not_counted)} come{'s'[len(not_counted) - 1 :]} on top"
    )


def _memory_lines(rank: Metrics, usable: str) -> list[str]:
    rows = [(name, size, "GPU") for name, size in rank["gpu"].items()]
    rows += [(name, size, "GPU, forward and backward pass") for name, size in rank["gpu_during_pass"].items()]
    rows += [("gradient and temporary", rank["gpu_during_optimizer_step"], "GPU, optimizer step")]
    rows += [(name, size, "host") for name, size in rank["host"].items()]
    rows += [(name, size, "NVMe") for name, size in rank["nvme"].items()]
    lines = [f"    {name.replace('_', ' '):26}{size / 1e9:8.2f}  {location}" for name, size, location in rows if size]
    return [*lines, f"    {'at most at once':26}{rank['gpu_at_most'] / 1e9:8.2f}  GPU, of {usable} usable"]


def _micro_batch_line(sizes: Metrics) -> str:
    fits = "fits"
    if not sizes["recipe_fits"]:
        problem = "does not fit"
        if not sizes["recipe_divides"]:
            problem = "does not divide the global batch over the ranks"
        elif not sizes["recipe_contrasts"]:
            problem = "is a single pair, which contrast and matching compare with nothing"
        fits = f"{problem}; set training.micro_batch to {sizes['planned']}"
        if sizes["recipe_fits_with_checkpointing"]:
            fits += " or training.activation_checkpointing to true"
    if sizes["largest"] == sizes["share"]:
        most = "all of the global batch that a rank has"
    else:
        most = f"the largest that fits, {sizes['largest_dividing']} the largest that also divides the global batch"
    return f"micro-batch: the recipe's {sizes['recipe']} {fits}; {sizes['largest']} is {most}"
