"""AdamW with one learning rate per role; `lr_schedule` scales all of them.

Source: METER, arXiv 2111.02387 (fusion and heads at five times the towers' rate); BEiT, arXiv 2106.08254, for rates
that fall from layer to layer.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import nn

from unimo3.model.unimo3 import Unimo3Model, Unimo3PreTrainedModel
from unimo3.training.adam import build_adam
from unimo3.training.args import OptimArgs
from unimo3.training.parts import parameter_levels, tower_layers


def build_optimizer(model: Unimo3PreTrainedModel, args: OptimArgs, offloaded: bool = False) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`, by the implementation `args` asks for.

    Args:
        offloaded: the optimizer's state lies in main memory while the model is on a GPU.
    """
    groups = parameter_groups(model, args)
    return build_adam(groups, (args.beta1, args.beta2), args.eps, args.fused, offloaded)


def parameter_groups(model: Unimo3PreTrainedModel, args: OptimArgs) -> list[dict]:
    """Trained parameters by role (tower, fusion, head), layer of a tower and decay, in a stable order.

    A tied one goes where it comes first. Layers of both towers with as many layers above them share their groups.
    Without a layer-wise decay of the rate all layers do.
    """
    base = cast(Unimo3Model, model.unimo3)
    towers = (base.text_tower, base.vision_tower)
    roles: tuple[tuple[str, tuple[nn.Module, ...], float], ...] = (
        ("tower", towers, 1.0),
        ("fusion", (base,), args.fusion_factor),
        ("head", (model,), args.head_factor),
    )
    heights = _layers_above(towers) if args.tower_layer_decay != 1 else {}
    seen: set[nn.Parameter] = set()
    groups = []
    for role, modules, factor in roles:
        members: dict[tuple[int, str], list[nn.Parameter]] = {}
        for parameter, kind in _by_decay(modules, seen):
            members.setdefault((heights.get(parameter, 0), kind), []).append(parameter)
        # The lowest layers first; "decay" before "no_decay".
        for num_above, kind in sorted(members, key=lambda key: (-key[0], key[1])):
            lr = args.lr * factor * args.tower_layer_decay**num_above
            groups.append(
                {
                    "name": f"{role}_below_{num_above}_{kind}" if num_above else f"{role}_{kind}",
                    "params": members[num_above, kind],
                    "lr": lr,
                    "peak_lr": lr,
                    "weight_decay": args.weight_decay if kind == "decay" else 0.0,
                }
            )
    return groups


def _layers_above(towers: Iterable[nn.Module]) -> dict[nn.Parameter, int]:
    """How many layers of its tower are above each parameter; above embeddings all are."""
    return {
        parameter: max(0, len(tower_layers(tower)) - level)
        for tower in towers
        for parameter, level in parameter_levels(tower).items()
    }


def _by_decay(roots: Iterable[nn.Module], seen: set[nn.Parameter]) -> Iterator[tuple[nn.Parameter, str]]:
    # By the module's type: under ZeRO-3 every parameter's shape is flat.
    for root in roots:
        for module in root.modules():
            has_matrix = isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))
            for name, parameter in module.named_parameters(recurse=False):
                if parameter in seen:
                    continue
                seen.add(parameter)
                if parameter.requires_grad:
                    yield parameter, "decay" if has_matrix and name == "weight" else "no_decay"
