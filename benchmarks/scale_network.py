"""Bytes and seconds of a step between ranks, for the recipes and ds_configs that the planner compares.

Source: unimo3/training/plan/network.py for the formulas.
"""

from collections.abc import Sequence

from benchmarks.report import ROOT
from pretrain.plan import parse_settings, recipe_of
from unimo3.training.ds_config import BatchPlan, read_ds_config
from unimo3.training.plan.memory import Sharding, model_sizes
from unimo3.training.plan.network import network_s, step_traffic
from unimo3.training.plan.settings import Fabric, Machine

_DS_CONFIGS = ("zero2_bf16", "zero3_bf16", "zero3_hpz")
_GIGA = 1e9


def network_table(recipes: Sequence[str] = ("base", "large", "xl"), num_gpus: Sequence[int] = (8, 64, 1024)) -> str:
    """In markdown, a row a recipe, ds_config and number of GPUs, with one micro-step a step."""
    fabric = Fabric()
    lines = [
        "| recipe | ds_config | GPUs | a rank receives, GB | s a step |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for recipe in recipes:
        step = recipe_of(parse_settings(["--config", str(ROOT / "pretrain" / "recipes" / f"{recipe}.yaml")]))
        sizes = model_sizes(step.build(), step.optim)
        for name in _DS_CONFIGS:
            for gpus in num_gpus:
                path = ROOT / "ds_configs" / f"{name}.json"
                sharding = Sharding(read_ds_config(str(path), BatchPlan(gpus, 1, gpus), 1.0))
                if gpus <= sharding.secondary_ranks > 1:
                    continue  # for several nodes
                traffic = step_traffic(sizes, sharding, num_micro_steps=1)
                seconds = network_s(traffic, Machine(gpus, 1, 0.0, {}, 1.0, fabric))
                received = traffic.received_bytes(gpus) / _GIGA
                lines.append(f"| `{recipe}` | `{name}.json` | {gpus} | {received:.2f} | {seconds:.3f} |")
    lines += [
        "",
        f"Computed, not measured: one micro-step a step, {fabric.gpus_per_node} GPUs a node,",
        f"{fabric.node_bytes_s / _GIGA:g} GB/s a GPU in a node, {fabric.network_bytes_s / _GIGA:g} GB/s a GPU between",
        "nodes, nothing hidden by computation. The planner adds these seconds to those of the operations.",
    ]
    return "\n".join(lines)
