"""The cross-modal encoder: two streams that read each other layer by layer and across layers.

Level i of a stream is its state after fusion layer i (level 0: before the first). Layer l reads levels 0..l-1 of the
other stream; level l-1 is its in-layer partner, the earlier ones are cross-layer. Every level's keys and values are
projected once, by the layer whose partner it is, and kept in a bank for the later layers. With ``in_layer`` the bank
holds the partner alone, which is METER's co-attention with the same parameters.

Source: the interaction of arXiv 2305.13697 on METER's encoder, arXiv 2111.02387.
"""

# Shapes: B batch, T text tokens, V image tokens, D width, H heads, S visible levels.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from unimo3.model.attention import CrossLayerAttention, FeedForward, KeyValue, LevelKeyValue, SelfAttention
from unimo3.model.config import Unimo3Config


class FusionOutput(NamedTuple):
    """States of both streams after the last layer, and what the gates did.

    `text_gates` and `image_gates` hold one [B, tokens, H, S] tensor a layer, None where a layer has no gate.
    """

    text: Tensor
    image: Tensor
    text_gates: tuple[Tensor | None, ...]
    image_gates: tuple[Tensor | None, ...]


def mean_shares(gates: Sequence[Tensor | None], mask: Tensor | None) -> Tensor | None:
    """How much each level counted, on average over a batch's tokens.

    Args:
        gates: a stream's gates, one [B, T, H, S] tensor a layer; None where a layer has none.
        mask: [B, T], 1 where a token is real; None if all are.

    Returns:
        [gated layers, H, most levels], zero for levels a layer does not see; None if no layer has a gate.
    """
    gated = [gate.detach().float() for gate in gates if gate is not None]
    if not gated:
        return None
    num_levels = max(gate.shape[-1] for gate in gated)
    tokens = (torch.ones(gated[0].shape[:2]) if mask is None else mask).to(gated[0])[:, :, None, None]
    means = [(gate * tokens).sum(dim=(0, 1)) / tokens.sum() for gate in gated]
    return torch.stack([pad(mean, (0, num_levels - mean.shape[-1])) for mean in means])


class StreamLayer(nn.Module):
    """One fusion layer of one stream."""

    def __init__(self, config: Unimo3Config, num_levels: int):
        super().__init__()
        self.self_attention = SelfAttention(config)
        self.partner_key_value = LevelKeyValue(config)
        self.cross_attention = CrossLayerAttention(config, num_levels)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        partner: Tensor,
        earlier_levels: list[KeyValue],
        mask: Tensor | None,
        partner_mask: Tensor | None,
    ) -> tuple[Tensor, KeyValue, Tensor | None]:
        """Read own tokens, then the other stream's levels.

        Args:
            x: this stream, [B, T, D].
            partner: the other stream at the same depth, [B, V, D].
            earlier_levels: the other stream's projected levels below, nearest last.
            mask: [B, T], True where a token is real.
            partner_mask: [B, V], likewise.

        Returns:
            The new state, the partner level's keys and values for later layers, and the gates.
        """
        h = self.self_attention(x, mask)
        level = self.partner_key_value(partner)
        h, gate = self.cross_attention(h, [*earlier_levels, level], partner_mask)
        return self.feed_forward(h), level, gate


class FusionEncoder(nn.Module):
    """L fusion layers over both streams, with weights of their own per stream."""

    def __init__(self, config: Unimo3Config):
        super().__init__()
        self.crosses_layers = config.interaction == "cross_layer"
        depths = range(1, config.num_hidden_layers + 1)
        num_levels = [depth if self.crosses_layers else 1 for depth in depths]
        self.text_layers = nn.ModuleList(StreamLayer(config, levels) for levels in num_levels)
        self.image_layers = nn.ModuleList(StreamLayer(config, levels) for levels in num_levels)

    def forward(self, text: Tensor, image: Tensor, text_mask: Tensor | None) -> FusionOutput:
        """text [B, T, D], image [B, V, D], text_mask [B, T] with True where a token is real."""
        image_bank: list[KeyValue] = []
        text_bank: list[KeyValue] = []
        text_gates, image_gates = [], []
        for text_layer, image_layer in zip(self.text_layers, self.image_layers, strict=True):
            new_text, image_level, text_gate = text_layer(text, image, image_bank, text_mask, None)
            new_image, text_level, image_gate = image_layer(image, text, text_bank, None, text_mask)
            if self.crosses_layers:
                image_bank.append(image_level)
                text_bank.append(text_level)
            text, image = new_text, new_image
            text_gates.append(text_gate)
            image_gates.append(image_gate)
        return FusionOutput(text, image, tuple(text_gates), tuple(image_gates))
