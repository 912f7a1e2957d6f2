"""The parts of a model by their modules, which of them train, and the layers of a tower from below.

Source: LiT, arXiv 2111.07991, for training against a locked tower.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from unimo3.errors import ConfigError
from unimo3.model.text import text_layers
from unimo3.model.unimo3 import Unimo3Model, Unimo3PreTrainedModel
from unimo3.model.vision import VisionTower
from unimo3.training.args import TOWERS, OptimArgs

if TYPE_CHECKING:
    from unimo3.model.config import Unimo3Config


def parts_of(model: Unimo3PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """Parameters by part, in the order of `PARTS`; a tied one belongs to the first part that has it."""
    base = cast(Unimo3Model, model.unimo3)
    owners = {"text_tower": base.text_tower, "vision_tower": base.vision_tower, "fusion": base, "heads": model}
    seen: set[nn.Parameter] = set()
    parts = {}
    for part, owner in owners.items():
        parts[part] = [parameter for parameter in owner.parameters() if parameter not in seen]
        seen.update(parts[part])
    return parts


def tower_layers(tower: nn.Module) -> list[nn.Module]:
    """A tower's transformer layers, the lowest first."""
    return list(cast(Any, tower.vit).blocks) if isinstance(tower, VisionTower) else text_layers(tower)


def parameter_levels(tower: nn.Module) -> dict[nn.Parameter, int]:
    """The level of each parameter of a tower with n layers.

    Returns:
        0 for the embeddings and all else that is below or in several layers, k for layer k from below, n + 1 for what
        follows the layers.
    """
    layers = tower_layers(tower)
    levels = dict.fromkeys(tower.parameters(), 0)
    for number, layer in enumerate(layers, start=1):
        levels |= dict.fromkeys(layer.parameters(), number)
    stack = tower.vit if isinstance(tower, VisionTower) else tower
    for module in (getattr(stack, name, None) for name in ("norm", "fc_norm", "final_norm")):
        if isinstance(module, nn.Module):
            levels |= dict.fromkeys(module.parameters(), len(layers) + 1)
    return levels


def freeze_parts(model: Unimo3PreTrainedModel, args: OptimArgs) -> None:
    """Turn off the gradients of what `args` freezes, before an engine is built; autograd then skips a frozen bottom.

    Raises:
        ConfigError: a tower has fewer layers than are to be frozen, or no parameter is left to train.
    """
    base = cast(Unimo3Model, model.unimo3)
    towers = {"text_tower": base.text_tower, "vision_tower": base.vision_tower}
    depths = {name: len(tower_layers(tower)) for name, tower in towers.items()}
    if errors := _depth_errors(args, depths):
        raise ConfigError(errors)
    parts = parts_of(model)
    for part, num_layers in args.frozen.items():
        levels = parameter_levels(towers[part]) if num_layers is not None else {}
        for parameter in parts[part]:
            if num_layers is None or levels[parameter] <= num_layers:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"optim.freeze: {args.freeze}: no parameter is left to train; leave a part out")


def freeze_errors(model: "Unimo3Config", args: OptimArgs) -> list[str]:
    """Return where more layers are to be frozen than a tower has, one line per error."""
    counted = [part for part, num_layers in args.frozen.items() if num_layers is not None]
    depths = {"text_tower": model.text_config.num_hidden_layers}
    if TOWERS[1] in counted:
        with torch.device("meta"):
            depths[TOWERS[1]] = VisionTower(model.vision_config).depth
    return _depth_errors(args, depths)


def _depth_errors(args: OptimArgs, depths: dict[str, int]) -> list[str]:
    return [
        f"optim.freeze: {part}: {num_layers}: the tower has {depths[part]} layers; name at most that, or {part} alone "
        "to freeze all of it"
        for part, num_layers in args.frozen.items()
        if num_layers is not None and num_layers > depths[part]
    ]


def check_trains(loss: Tensor, freeze: object) -> None:
    """Refuse a loss that no trained parameter has a part in.

    Raises:
        ConfigError: on every rank.
    """
    if not loss.requires_grad:
        raise ConfigError(
            f"optim.freeze: {freeze}: the loss depends on no parameter that trains; leave a part out that the "
            "objectives read"
        )
