"""The table of sizes in the documentation: parameters by role, and operations a pair.

Source: docs/architecture.md, whose table a test compares with this one.
"""

from dataclasses import dataclass

import torch

from unimo3.kernels.args import KernelArgs
from unimo3.model.config import Unimo3Config
from unimo3.objectives.args import ObjectivesArgs
from unimo3.training.plan.memory import model_sizes
from unimo3.training.plan.trace import build_on_meta, trace_step


@dataclass(frozen=True)
class Recipe:
    """What of a recipe decides its sizes."""

    model: Unimo3Config
    objectives: ObjectivesArgs
    num_tokens: int
    kernels: KernelArgs


def sizes_table(recipes: dict[str, Recipe]) -> str:
    """A markdown table with one row a recipe, in the given order.

    Operations are those of one training step, all objectives and passes, without activation checkpointing.
    """
    lines = [
        "| recipe | text tower | image tower | fusion | heads | parameters | GFLOPs a pair, forward | training |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, recipe in recipes.items():
        sizes = model_sizes(build_on_meta(recipe.model))
        cost = trace_step(recipe.model, recipe.objectives, recipe.num_tokens, torch.bfloat16, False, recipe.kernels)
        counts = " | ".join(f"{count:,}" for count in [*sizes.roles.values(), sizes.total])
        lines.append(f"| `{name}` | {counts} | {cost.forward_flops / 1e9:.4g} | {cost.flops / 1e9:.4g} |")
    return "\n".join(lines)
