"""Gates and rates that the pilot of the gate compares with the model's own; the model itself does not offer them.

One softmax over the keys of all levels equals a gate whose logits are the log-sum-exp of each level's scores. So
`JointGate` computes these shares, and the attention itself is the model's.

Source: Luong et al., arXiv 1508.04025, for scores; the rest: none.
"""

# Shapes: B samples, T tokens of a stream, V tokens of the other, H heads, d their width, S visible levels.

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unimo3.kernels.cross_layer_attention import cross_layer_attention
from unimo3.model.attention import CrossLayerAttention
from unimo3.model.config import Unimo3Config
from unimo3.model.fusion import FusionEncoder
from unimo3.model.level_gate import LevelGate


class JointGate(LevelGate):
    """Each level's share of one softmax over the keys of all levels, with a bias for each level and head."""

    def forward(self, query: Tensor, levels: Sequence[Tensor], padding_mask: Tensor | None) -> Tensor:
        """Weigh the levels.

        Args:
            query: [B, T, H, d].
            levels: keys and values, [B, V, 2, H, d] each.
            padding_mask: [B, V], True where a token of the other stream is real.

        Returns:
            [B, T, H, S] in float32.
        """
        keys = torch.stack([level[:, :, 0] for level in levels], dim=1)
        scores = torch.einsum("bthd,bsvhd->bthsv", query, keys).float() * query.shape[-1] ** -0.5
        if padding_mask is not None:
            scores = scores.masked_fill(~padding_mask[:, None, None, None, :], float("-inf"))
        return (scores.logsumexp(-1) + self.bias.unflatten(0, (self.num_heads, self.num_levels))).softmax(-1)


class JointAttention(CrossLayerAttention):
    """Cross-layer attention with a `JointGate`.

    Args:
        num_levels: levels this layer sees, 2 or more.
    """

    def __init__(self, config: Unimo3Config, num_levels: int):
        super().__init__(config, num_levels)
        self.gate = JointGate(config, num_levels)

    def forward(self, h: Tensor, levels: Sequence[Tensor], padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `CrossLayerAttention`."""
        query = self.query(h).unflatten(-1, (self.num_heads, -1))
        gate = self.gate(query, levels, padding_mask)
        dropout_p = self.attention_dropout if self.training else 0.0
        attended = cross_layer_attention(query, levels, gate, padding_mask, self.impl, dropout_p)
        return self.norm(h + self.dropout(self.out(attended.flatten(2)))), gate


def use_joint_gates(fusion: FusionEncoder, config: Unimo3Config) -> None:
    """Replace the cross-layer attention of all layers with a gate; the new ones have no initial values yet."""
    for stream in (fusion.text, fusion.image):
        for layer in stream.layers:
            if layer.cross_attention.gate is not None:
                layer.cross_attention = JointAttention(config, layer.cross_attention.gate.num_levels)


def multiply_gate_rate(optimizer: torch.optim.Optimizer, model: nn.Module, factor: float) -> None:
    """Give the parameters of all gates a group of their own, whose peak rate is `factor` times as high."""
    gates = {
        parameter for module in model.modules() if isinstance(module, LevelGate) for parameter in module.parameters()
    }
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if parameter in gates]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if parameter not in gates]
            rate = group["peak_lr"] * factor
            others = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group(others | {"params": moved, "lr": rate, "peak_lr": rate})
