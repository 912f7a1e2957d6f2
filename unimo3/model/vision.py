"""The image tower: a timm vision transformer that returns the states of its top layers, after its final norm.

The first token of the states is the image's pooled vector: the class token, or without one the mean of the patches.
Register tokens take part in the tower alone.

Source: timm's vision_transformer.py; CLIP, arXiv 2103.00020, for the architecture METER uses; arXiv 2309.16588 for
registers.
"""

# Shapes: B batch, S pixels a side, n states, V tokens, W width.

from functools import partial
from typing import Any

import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from unimo3.errors import ConfigError
from unimo3.model.config import Unimo3VisionConfig

_STRUCTURES = (VisionTransformer, VisionTransformerRelPos, Eva, Beit)
_EXAMPLE = "vit_base_patch16_clip_quickgelu_224"
# Why timm's other transformers are refused, by the names of their classes.
_OTHERS = {
    "Cait": "its class token joins after the layers",
    "ConVit": "its class token joins between the layers",
    "NaFlexVit": "it resizes its position table to every image",
    "VisionTransformerDistilled": "timm builds it only with heads for its class and distillation tokens",
    "VisionTransformerSAM": "its layers return maps, not tokens",
    "Xcit": "its class token joins after the layers",
}


class VisionTower(nn.Module):
    """[B, 3, S, S] pixels -> tokens after each of the top layers: the pooled vector, then the patches.

    Args:
        num_states: top layers whose states are returned.

    Attributes:
        has_class_token: whether the pooled vector is the class token; otherwise the patches' mean.
        num_registers: tokens that are not returned.
        num_tokens: V.
    """

    def __init__(self, config: Unimo3VisionConfig, num_states: int = 1):
        super().__init__()
        errors = config.validate()
        if errors:
            raise ConfigError(errors)
        try:
            vit: Any = timm.create_model(
                config.architecture,
                pretrained=False,
                img_size=config.image_size,
                num_classes=0,
                global_pool="",
                **config.overrides,
            )
        except Exception:  # of many kinds, also for architectures that do not take these arguments
            with torch.device("meta"):
                _check_structure(config.architecture, timm.create_model(config.architecture, pretrained=False))
            raise
        _check_structure(config.architecture, vit)
        # Only the transformer's forward may be called: ZeRO-3 gathers its class token and its position table when
        # that starts.
        vit.forward = partial(_top_states, vit, num_states)
        # In some architectures a patch is the product of several strides.
        patch = max(vit.patch_embed.feat_ratio(as_scalar=True), vit.patch_embed.patch_size[0])
        if config.image_size % patch:
            raise ConfigError(f"model.vision.image_size: {config.image_size}: not a multiple of the patch size {patch}")
        self.vit = vit
        self.width: int = vit.num_features
        self.depth: int = len(vit.blocks)
        self.has_class_token: bool = vit.cls_token is not None
        self.num_registers: int = vit.num_prefix_tokens - self.has_class_token
        self.num_tokens: int = vit.patch_embed.num_patches + 1

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S] -> [B, n, V, W], the last layer's states last."""
        states: Tensor = self.vit(pixel_values)
        return states


def _check_structure(architecture: str, vit: Any) -> None:
    where, kind = f"model.vision.architecture: '{architecture}'", type(vit).__name__
    if not isinstance(vit, _STRUCTURES) or kind in _OTHERS:
        names = ", ".join(structure.__name__ for structure in _STRUCTURES)
        reason = f": {_OTHERS[kind]}" if kind in _OTHERS else ""
        raise ConfigError(
            f"{where}: is a {kind} of timm{reason}; use one of timm's classes {names}, whose layers all return the "
            f"tokens of the same patches, such as {_EXAMPLE}"
        )
    if getattr(vit, "rope_mixed", False):
        raise ConfigError(
            f"{where}: learns the frequencies of its rotary positions, which timm draws without the run's seed; use "
            "one whose frequencies are constant, such as eva02_base_patch16_clip_224"
        )


def _top_states(vit: Any, num_states: int, pixel_values: Tensor) -> Tensor:
    layers = vit.forward_intermediates(
        pixel_values,
        indices=num_states,
        return_prefix_tokens=vit.num_prefix_tokens > 0,  # timm fails at an empty prefix
        norm=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    states = []
    for layer in layers:
        patches = layer[0] if vit.num_prefix_tokens else layer
        pooled = patches.mean(dim=1, keepdim=True) if vit.cls_token is None else layer[1][:, :1]
        states.append(torch.cat([pooled, patches], dim=1))
    return torch.stack(states, dim=1)
