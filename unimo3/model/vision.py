"""The image tower: a timm vision transformer that returns the states of its top layers, after its final norm.

Source: timm's vision_transformer.py; CLIP, arXiv 2103.00020, for the architecture METER uses.
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


class VisionTower(nn.Module):
    """[B, 3, S, S] pixels -> tokens after each of the top layers, class token first.

    Args:
        num_states: top layers whose states are returned.
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
        if getattr(vit, "rope_mixed", False):
            raise ConfigError(
                f"model.vision.architecture: '{config.architecture}': learns the frequencies of its rotary positions, "
                "which is not supported; use one whose frequencies are constant, such as eva02_base_patch16_clip_224"
            )
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
        self.num_tokens: int = vit.patch_embed.num_patches + vit.num_prefix_tokens

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S] -> [B, n, V, W], the last layer's states last."""
        states: Tensor = self.vit(pixel_values)
        return states


def _check_structure(architecture: str, vit: Any) -> None:
    where = f"model.vision.architecture: '{architecture}'"
    if not isinstance(vit, _STRUCTURES):
        names = ", ".join(kind.__name__ for kind in _STRUCTURES)
        raise ConfigError(
            f"{where}: is a {type(vit).__name__} of timm, whose structure is not supported; use a model of timm's "
            f"classes {names} with one class token, such as {_EXAMPLE}"
        )
    if getattr(vit, "cls_token", None) is None or vit.num_prefix_tokens != 1:
        raise ConfigError(
            f"{where}: has not one class token, which pooling and contrast read; use a vision transformer with one, "
            f"such as {_EXAMPLE}"
        )


def _top_states(vit: Any, num_states: int, pixel_values: Tensor) -> Tensor:
    states = vit.forward_intermediates(
        pixel_values,
        indices=num_states,
        return_prefix_tokens=True,
        norm=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    return torch.stack([torch.cat([prefix, patches], dim=1) for patches, prefix in states], dim=1)
