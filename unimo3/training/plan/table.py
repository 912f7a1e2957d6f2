"""The tables of the documentation: sizes of models, and what fine-tuning them takes.

Source: docs/architecture.md and docs/finetuning.md, whose tables tests compare with these.
"""

import torch

from unimo3.training.plan.memory import model_sizes
from unimo3.training.plan.report import Metrics
from unimo3.training.plan.step_trace import Step, trace_step


def sizes_table(recipes: dict[str, Step]) -> str:
    """A markdown table of parameters by role, and operations a pair, with one row a recipe, in the given order.

    Operations are those of one training step, all objectives and passes, without activation checkpointing.
    """
    lines = [
        "| recipe | text tower | image tower | fusion | heads | parameters | GFLOPs a pair, forward | training |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, step in recipes.items():
        sizes = model_sizes(step.build(), step.optim)
        cost = trace_step(step, torch.bfloat16, activation_checkpointing=False)
        counts = " | ".join(f"{count:,}" for count in [*sizes.roles.values(), sizes.total])
        lines.append(f"| `{name}` | {counts} | {cost.forward_flops / 1e9:.4g} | {cost.flops / 1e9:.4g} |")
    return "\n".join(lines)


def needs_table(plans: dict[str, Metrics]) -> str:
    """A markdown table of what runs need, with one row a plan of `plan_metrics`, in the given order."""
    lines = [
        "| recipe | ds_config | micro-batch | GB a rank at most | GFLOPs a unit | hours | of them between ranks |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, plan in plans.items():
        gflops = sum(plan["flops_per_pair"].values()) / 1e9
        again = ", with checkpointing" if plan["activation_checkpointing"] else ""
        lines.append(
            f"| `{name}` | `{plan['ds_config']}` | {plan['micro_batch']['planned']}{again} | "
            f"{plan['rank_bytes']['gpu_at_most'] / 1e9:.1f} | {gflops:,.0f} | {plan['time']['hours']:.2f} | "
            f"{plan['time']['network_hours']:.3f} |"
        )
    return "\n".join(lines)
