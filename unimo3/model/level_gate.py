"""The gate that weighs the levels of the other modality.

Source: UNIMO-3, arXiv 2305.13697.
"""

# Shapes: B samples, T tokens, D width, H heads, S visible levels.

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from unimo3.model.config import Unimo3Config


class LevelGate(nn.Module):
    """How much each visible level counts: softmax over levels of W h + b, for every token and head.

    W starts at zero and b so that the in-layer level, the last one, has the weight `gate_init` and the others split
    the rest. With ``static`` there is no W: one learned distribution a head.
    """

    def __init__(self, config: Unimo3Config, num_levels: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_levels = num_levels
        self.in_layer_logit = math.log(config.gate_init / (1 - config.gate_init) * (num_levels - 1))
        self.bias = nn.Parameter(torch.zeros(self.num_heads * num_levels))
        self.weight = (
            nn.Parameter(torch.zeros(self.num_heads * num_levels, config.hidden_size))
            if config.gate == "token"
            else None
        )

    def initial_bias(self) -> Tensor:
        """[H * S], the logits that give the initial weights."""
        bias = torch.zeros(self.num_heads, self.num_levels)
        bias[:, -1] = self.in_layer_logit
        return bias.flatten()

    def forward(self, h: Tensor) -> Tensor:
        """h [B, T, D] -> weights [B, T, H, S] in float32."""
        if self.weight is None:
            logits = self.bias.expand(*h.shape[:2], -1)
        else:
            logits = linear(h, self.weight, self.bias)
        return logits.unflatten(-1, (self.num_heads, self.num_levels)).float().softmax(dim=-1)
