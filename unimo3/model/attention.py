"""Self-attention, cross-layer attention and the feed-forward network of a fusion layer (post-norm, as METER).

Source: METER, arXiv 2111.02387, section 3; transformers' BridgeTowerBertCrossLayer is the same layer.
"""

# Shapes: B batch, T tokens of this stream, V tokens of the other, D width, H heads, d = D / H, S visible levels.

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import gelu
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unimo3.kernels.cross_layer_attention import cross_layer_attention
from unimo3.model.config import Unimo3Config
from unimo3.model.level_gate import LevelGate


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, D] -> [B, H, T, d]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations, with transformers' signature: what ``attn_implementation="eager"`` chooses.

    Args:
        module: unused; other implementations read settings from it.
        query: [B, H, T, d]; `key` and `value` have the same shape.
        attention_mask: broadcastable to [B, H, T, T], True where a key may be read.

    Returns:
        [B, T, H, d] and the weights [B, H, T, T].
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = drop(scores.float().softmax(dim=-1).to(query.dtype), p=dropout)
    return (weights @ value).transpose(1, 2), weights


class SelfAttention(nn.Module):
    """LN(x + attention(x)), by the implementation that ``config._attn_implementation`` names (sdpa or eager)."""

    is_causal = False

    def __init__(self, config: Unimo3Config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """x [B, T, D], padding_mask [B, T] with True where a token may be read -> [B, T, D]."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        mask = None if padding_mask is None else padding_mask[:, None, None, :]
        # None outside a PreTrainedModel, which decides.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "sdpa", eager_attention)
        dropout_p = self.attention_dropout if self.training else 0.0
        attended, _ = attend(self, q, k, v, mask, dropout=dropout_p, scaling=self.scaling)
        return self.norm(x + self.dropout(self.out(attended.flatten(2))))


class LevelKeyValue(nn.Module):
    """Projects one level of a stream to the keys and values that the other stream reads.

    Args:
        width: of the level's states; the tower's width where a tower layer is a level.
    """

    def __init__(self, config: Unimo3Config, width: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.projection = nn.Linear(width, 2 * config.hidden_size)

    def forward(self, state: Tensor) -> Tensor:
        """state [B, V, width] -> keys and values [B, V, 2, H, d]; later layers read them as they are."""
        projected: Tensor = self.projection(state)
        return projected.unflatten(-1, (2, self.num_heads, -1))


class CrossLayerAttention(nn.Module):
    """LN(h + W_o . attention(h, levels of the other stream)).

    Args:
        num_levels: levels this layer sees; 1 is METER's co-attention and has no gate.
    """

    def __init__(self, config: Unimo3Config, num_levels: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gate = LevelGate(config, num_levels) if num_levels > 1 and config.gate != "uniform" else None
        self.impl: str | None = None  # of the kernel; None: by the device

    def forward(self, h: Tensor, levels: Sequence[Tensor], padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Read the levels.

        Args:
            h: this stream, [B, T, D].
            levels: keys and values of the other stream, [B, V, 2, H, d] each.
            padding_mask: [B, V], True where a token of the other stream is real.

        Returns:
            The new state [B, T, D], and the gates [B, T, H, S], None without a gate.
        """
        gate = None if self.gate is None else self.gate(h)
        attended = cross_layer_attention(
            self.query(h).unflatten(-1, (self.num_heads, -1)),
            levels,
            gate,
            padding_mask,
            self.impl,
            self.attention_dropout if self.training else 0.0,
        )
        return self.norm(h + self.dropout(self.out(attended.flatten(2)))), gate


class FeedForward(nn.Module):
    """LN(x + W_2 gelu(W_1 x))."""

    def __init__(self, config: Unimo3Config):
        super().__init__()
        self.inner = nn.Linear(config.hidden_size, config.intermediate_size)
        self.outer = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.norm(x + self.dropout(self.outer(gelu(self.inner(x)))))
