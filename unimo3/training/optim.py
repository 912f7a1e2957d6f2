"""AdamW with one learning rate per role; `lr_schedule` scales all of them.

Source: METER, arXiv 2111.02387 (fusion and heads at five times the towers' rate).
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from unimo3.model.unimo3 import Unimo3Model, Unimo3PreTrainedModel
from unimo3.training.adam import build_adam
from unimo3.training.args import OptimArgs


def build_optimizer(model: Unimo3PreTrainedModel, args: OptimArgs, offloaded: bool = False) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`, by the implementation `args` asks for.

    Args:
        offloaded: the optimizer's state lies in main memory while the model is on a GPU.
    """
    groups = parameter_groups(model, args)
    return build_adam(groups, (args.beta1, args.beta2), args.eps, args.fused, offloaded)


def parameter_groups(model: Unimo3PreTrainedModel, args: OptimArgs) -> list[dict]:
    """Trained parameters by role (tower, fusion, head) and by decay, in a stable order.

    A tied one goes where it comes first.
    """
    base = cast(Unimo3Model, model.unimo3)
    roles: tuple[tuple[str, tuple[nn.Module, ...], float], ...] = (
        ("tower", (base.text_tower, base.vision_tower), 1.0),
        ("fusion", (base,), args.fusion_factor),
        ("head", (model,), args.head_factor),
    )
    seen: set[int] = set()
    groups = []
    for role, modules, factor in roles:
        decayed, plain = _split_by_decay(modules, seen)
        for kind, parameters in (("decay", decayed), ("no_decay", plain)):
            if parameters:
                groups.append(
                    {
                        "name": f"{role}_{kind}",
                        "params": parameters,
                        "lr": args.lr * factor,
                        "peak_lr": args.lr * factor,
                        "weight_decay": args.weight_decay if kind == "decay" else 0.0,
                    }
                )
    return groups


def _split_by_decay(roots: Iterable[nn.Module], seen: set[int]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    # By the module's type: under ZeRO-3 every parameter's shape is flat.
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for root in roots:
        for module in root.modules():
            has_matrix = isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                if not parameter.requires_grad:
                    continue  # frozen
                (decayed if has_matrix and name == "weight" else plain).append(parameter)
    return decayed, plain
