"""Initial values of every parameter, a function of (seed, module name) alone.

Each module's values come from a generator seeded by its name, so they do not depend on the order of construction, on
the number of ranks, or on how ZeRO-3 has sharded the parameters.

Source: BERT's normal(0, 0.02), arXiv 1810.04805; timm for the constants of its layers.
"""

import contextlib
import hashlib

import torch
from torch import nn
from transformers import initialization as init

from unimo3.model.heads import ItcHead, SecondImageShift
from unimo3.model.level_gate import LevelGate


def initialize_weights(model: nn.Module, seed: int, std: float = 0.02) -> None:
    """Fill every parameter of `model`, sharded by ZeRO-3 or not.

    Args:
        seed: of the run; the same seed gives the same weights at any world size.
        std: of the normal distribution of linear maps and embeddings.
    """
    for name, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        if parameters:
            with gathered(parameters):
                initialize_module(module, std, _generator(seed, name))


@torch.no_grad()
def initialize_module(module: nn.Module, std: float, generator: torch.Generator | None = None) -> None:
    """Fill the parameters that `module` itself owns, by its kind."""
    if isinstance(module, LevelGate):
        init.copy_(module.bias, module.initial_bias())
        if module.weight is not None:
            init.zeros_(module.weight)
    elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
        if module.weight is not None:
            init.ones_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, (nn.Linear, nn.Conv2d)):
        init.normal_(module.weight, std=std, generator=generator)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=std, generator=generator)
        if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
            module.weight[module.padding_idx].zero_()
    elif isinstance(module, ItcHead):
        init.constant_(module.temperature, module.temperature_init)
    elif isinstance(module, SecondImageShift):
        init.zeros_(module.vector)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        # Constants of timm's layers: scales of layers, separate biases, relative positions.
        reset()
    else:
        # Parameters that are no part of a layer: a ViT's class token and position table.
        for parameter in module.parameters(recurse=False):
            init.normal_(parameter, std=std, generator=generator)


def gathered(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager:
    """Gather parameters inside the block and broadcast rank 0's values at its end; a no-op without ZeRO-3."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(parameters, modifier_rank=0)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
