"""The cross-modal encoder: two streams that read each other layer by layer and across layers.

Level i of a stream is what enters its fusion layer i + 1. Layer l reads levels 0..l-1 of the other stream; level l-1 is
its in-layer partner, the earlier ones are cross-layer. Every level's keys and values are projected once, by the layer
whose partner it is, and cached in a bank for the later layers. With ``in_layer`` the bank has the partner alone, which
is METER's co-attention with the same parameters.

`unimodal_levels` puts the top layers of the other tower into the bank before level 0. With `bridge` the input of layer
i is LN_i(map(tower layer) + x), tower layers being the last L, as BridgeTower has it.

Source: the interaction of arXiv 2305.13697 on METER's encoder, arXiv 2111.02387; BridgeTower, arXiv 2206.08657.
"""

# Shapes: B batch, T text tokens, V image tokens, W tower width, D fusion width, H heads, S visible levels.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_layers import GradientCheckpointingLayer

from unimo3.model.attention import CrossLayerAttention, FeedForward, LevelKeyValue, SelfAttention
from unimo3.model.config import Unimo3Config


class FusionOutput(NamedTuple):
    """States of both streams after the last layer, and what the gates did.

    `text_gates` and `image_gates` contain one [B, tokens, H, S] tensor a layer, None where a layer has no gate.
    """

    text: Tensor
    image: Tensor
    text_gates: tuple[Tensor | None, ...]
    image_gates: tuple[Tensor | None, ...]


def mean_gates(gates: Sequence[Tensor | None], mask: Tensor | None) -> Tensor | None:
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


class StreamLayer(GradientCheckpointingLayer):
    """One fusion layer of one stream."""

    def __init__(self, config: Unimo3Config, num_levels: int):
        super().__init__()
        self.self_attention = SelfAttention(config)
        self.partner_key_value = LevelKeyValue(config, config.hidden_size)
        self.cross_attention = CrossLayerAttention(config, num_levels)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        partner: Tensor,
        earlier_levels: list[Tensor],
        mask: Tensor | None,
        partner_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attend to this stream's tokens, then to the other stream's levels.

        Args:
            x: this stream, [B, T, D].
            partner: the other stream at the same depth, [B, V, D].
            earlier_levels: the other stream's projected levels below, nearest last.
            mask: [B, T], True where a token is real.
            partner_mask: [B, V], the same.

        Returns:
            The new state, the partner level's keys and values for later layers, and the gates.
        """
        h = self.self_attention(x, mask)
        level = self.partner_key_value(partner)
        h, gate = self.cross_attention(h, [*earlier_levels, level], partner_mask)
        return self.feed_forward(h), level, gate


class Stream(nn.Module):
    """One modality's side of the encoder: its layers, its bridges, and its tower's layers as further levels.

    Args:
        num_levels: levels of the other stream that each layer sees.
        tower_width: width of this stream's tower.
    """

    def __init__(self, config: Unimo3Config, num_levels: Sequence[int], tower_width: int):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layers = nn.ModuleList(StreamLayer(config, levels) for levels in num_levels)
        self.bridge_norms = nn.ModuleList(nn.LayerNorm(width, eps=eps) for _ in num_levels if config.bridge)
        self.tower_key_values = nn.ModuleList(LevelKeyValue(config, tower_width) for _ in range(config.unimodal_levels))

    def enter(self, depth: int, x: Tensor | None, tower_inputs: Tensor) -> Tensor:
        """The input of layer `depth` (from 0): the state before it, with a bridge joined by a tower layer's.

        Args:
            x: the state after the layer before, [B, T, D]; None at depth 0.
            tower_inputs: tower states mapped to width D, [B, n, T, D]; n is 1, or the number of layers with bridges.
        """
        if not self.bridge_norms:
            return tower_inputs[:, 0] if x is None else x
        joining = tower_inputs[:, depth]
        bridged: Tensor = self.bridge_norms[depth](joining if x is None else joining + x)
        return bridged

    def tower_levels(self, states: Tensor) -> list[Tensor]:
        """The tower's top layers as levels, lowest first; states [B, n, T, W] with at least as many of them."""
        num_levels = len(self.tower_key_values)
        tops = states[:, states.shape[1] - num_levels :].unbind(1)
        return [project(state) for project, state in zip(self.tower_key_values, tops, strict=True)]


class FusionEncoder(nn.Module):
    """L fusion layers over both streams, with separate weights per stream."""

    def __init__(self, config: Unimo3Config, text_width: int, image_width: int):
        super().__init__()
        self.crosses_layers = config.interaction == "cross_layer"
        depths = range(1, config.num_hidden_layers + 1)
        num_levels = [config.unimodal_levels + depth if self.crosses_layers else 1 for depth in depths]
        self.text = Stream(config, num_levels, text_width)
        self.image = Stream(config, num_levels, image_width)

    def forward(
        self, text_inputs: Tensor, image_inputs: Tensor, text_states: Tensor, image_states: Tensor, mask: Tensor | None
    ) -> FusionOutput:
        """Run both streams.

        Args:
            text_inputs: tower states mapped to the fusion width, lowest first, [B, n, T, D]: n is 1, or L with bridges.
            image_inputs: the same, [B, n, V, D].
            text_states: the tower's unmapped states, [B, m, T, W]; m is at least the number of unimodal levels.
            image_states: the same, [B, m, V, W].
            mask: [B, T] with True where a text token is real.
        """
        text_bank, image_bank = self.text.tower_levels(text_states), self.image.tower_levels(image_states)
        text: Tensor | None = None
        image: Tensor | None = None
        text_gates, image_gates = [], []
        for depth, (text_layer, image_layer) in enumerate(zip(self.text.layers, self.image.layers, strict=True)):
            text_in = self.text.enter(depth, text, text_inputs)
            image_in = self.image.enter(depth, image, image_inputs)
            # Copies: with checkpointing a layer runs again in the backward pass, and the banks have grown by then.
            text, image_level, text_gate = text_layer(text_in, image_in, list(image_bank), mask, None)
            image, text_level, image_gate = image_layer(image_in, text_in, list(text_bank), None, mask)
            if self.crosses_layers:
                image_bank.append(image_level)
                text_bank.append(text_level)
            text_gates.append(text_gate)
            image_gates.append(image_gate)
        assert text is not None
        assert image is not None
        return FusionOutput(text, image, tuple(text_gates), tuple(image_gates))
