"""Gated attention over several levels of the other modality, in plain PyTorch.

    C_i = softmax(q K_i^T / sqrt(d) + padding) V_i          for every visible level i
    out = sum_i g_i C_i

Level by level: scores, a softmax in float32 or better, the gate folded into the probabilities, and a product that adds
to the result. A level whose gate is zero adds exact zeros, so gates that are one-hot give that level's result to the
bit. It supports every type and device, and is the oracle for the fused kernels.

Source: the cross-layer interaction of arXiv 2305.13697; the gate is this project's own (docs/architecture.md).
"""

# Shapes: B batch, H heads, T query tokens, V key tokens, S levels, d head width.

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unimo3.kernels.cross_layer_attention.dropout import retained_keys


def cross_layer_attention_reference(
    q: Tensor,
    levels: Sequence[Tensor],
    gate: Tensor | None,
    masks: Sequence[Tensor] | None = None,
    bits: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend to every level and mix the results by the gate.

    Args:
        q: queries [B, T, H, d].
        levels: keys and values, one [B, V_i, 2, H, d] tensor a level.
        gate: weight of each level, [B, T, H, S]; None weighs all levels equally.
        masks: one [B, V_i] a level, or a single one for all, True where a key may be read; a sample without any gets
            zeros of that level.
        bits: of dropout.py, [B, H, words]; None drops nothing.
        dropout_p: the probability with which `bits` drop an attention weight; the others are divided by 1 - p.

    Returns:
        [B, T, H, d] in q's dtype.
    """
    q = q.transpose(1, 2) * q.shape[-1] ** -0.5
    softmax_dtype = torch.promote_types(q.dtype, torch.float32)
    factors, unreadable, any_key = None, None, None
    if gate is None:
        gate = q.new_full((*q.shape[:3], len(levels)), 1 / len(levels)) if len(levels) > 1 else None
    else:
        gate = gate.to(q.dtype).transpose(1, 2)
    if bits is not None:
        longest = max(level.shape[1] for level in levels)
        factors = retained_keys(bits, q.shape[2], longest).to(q.dtype) / (1 - dropout_p)
    out = None
    for index, level in enumerate(levels):
        key, value = level.transpose(1, 3).unbind(2)  # [B, H, V, d]
        scores = q @ key.transpose(-1, -2)  # [B, H, T, V]
        if masks and (index == 0 or len(masks) > 1):
            # A softmax over nothing is NaN: such rows read all keys and are zeroed afterwards.
            read = masks[index]
            any_key = read.any(dim=-1)[:, None, None, None]
            unreadable = ~(read[:, None, None, :] | ~any_key)
        if unreadable is not None:
            scores = scores.masked_fill(unreadable, -math.inf)
        weights = scores.softmax(dim=-1, dtype=softmax_dtype).to(q.dtype)
        if gate is not None:
            weights = weights * gate[..., index, None]
        if factors is not None:
            weights = weights * factors[..., : key.shape[2]]
        mixed = weights @ value
        if any_key is not None:
            mixed = mixed * any_key
        out = mixed if out is None else out + mixed
    assert out is not None
    return out.transpose(1, 2)
