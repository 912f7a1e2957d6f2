"""The image tower: a timm vision transformer that returns all tokens after its final norm.

Source: timm's vision_transformer.py; CLIP, arXiv 2103.00020, for the architecture METER uses.
"""

from typing import Any

import timm
from torch import Tensor, nn

from unimo3.errors import ConfigError
from unimo3.model.config import Unimo3VisionConfig


class VisionTower(nn.Module):
    """[B, 3, S, S] pixels -> [B, V, width] tokens, class token first."""

    def __init__(self, config: Unimo3VisionConfig):
        super().__init__()
        faults = config.faults()
        if faults:
            raise ConfigError(faults)
        # Called as a whole (never through forward_features): ZeRO-3 gathers the class token and the position table,
        # which belong to the transformer itself, when its forward starts.
        vit: Any = timm.create_model(
            config.architecture,
            pretrained=False,
            img_size=config.image_size,
            num_classes=0,
            global_pool="",
            **config.overrides,
        )
        self.vit = vit
        self.width: int = vit.num_features
        self.num_tokens: int = vit.patch_embed.num_patches + vit.num_prefix_tokens

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S] -> [B, V, width]."""
        return self.vit(pixel_values)
