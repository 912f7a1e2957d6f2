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
from torch.nn.functional import dropout


def cross_layer_attention_reference(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    gate: Tensor | None,
    masks: Sequence[Tensor] | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend to every level and mix the results by the gate.

    Args:
        q: queries [B, H, T, d].
        k: one [B, H, V_i, d] tensor a level.
        v: as `k`.
        gate: weight of each level, [B, T, H, S]; None weighs all levels equally.
        masks: one [B, V_i] a level, True where a key may be read; a sample without any gets zeros of that level.
        dropout_p: probability of dropping an attention weight. A query drops a key at all levels or at none: levels
            are views of one token, and one of them would reveal what another hides.

    Returns:
        [B, H, T, d] in q's dtype.
    """
    q = q * q.shape[-1] ** -0.5
    softmax_dtype = torch.promote_types(q.dtype, torch.float32)
    dropout_mask, read, unreadable, any_key = None, None, None, None
    if gate is None:
        gate = q.new_full((*q.shape[:3], len(k)), 1 / len(k)) if len(k) > 1 else None
    else:
        gate = gate.to(q.dtype).transpose(1, 2)
    if dropout_p > 0:
        dropout_mask = dropout(q.new_ones(*q.shape[:3], max(key.shape[2] for key in k)), dropout_p)
    out = None
    for level, (key, value) in enumerate(zip(k, v, strict=True)):
        scores = q @ key.transpose(-1, -2)  # [B, H, T, V]
        if masks is not None and masks[level] is not read:
            # A softmax over nothing is NaN: such rows read all keys and are zeroed afterwards.
            read = masks[level]
            any_key = read.any(dim=-1)[:, None, None, None]
            unreadable = ~(read[:, None, None, :] | ~any_key)
        if unreadable is not None:
            scores = scores.masked_fill(unreadable, -math.inf)
        weights = scores.softmax(dim=-1, dtype=softmax_dtype).to(q.dtype)
        if gate is not None:
            weights = weights * gate[..., level, None]
        if dropout_mask is not None:
            weights = weights * dropout_mask[..., : key.shape[2]]
        mixed = weights @ value
        if any_key is not None:
            mixed = mixed * any_key
        out = mixed if out is None else out + mixed
    assert out is not None
    return out
