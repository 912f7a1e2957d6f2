"""Gated attention over several levels of the other modality, in plain PyTorch.

    C_i = softmax(q K_i^T / sqrt(d) + padding) V_i          for every visible level i
    out = sum_i g_i C_i

Levels of one length are stacked along the heads, so that one ``scaled_dot_product_attention`` call serves them all;
it accumulates in float32. This is what CPU tensors run, and the oracle for fused kernels.

Source: the cross-layer interaction of arXiv 2305.13697; the gate is this project's own (docs/architecture.md).
"""

# Shapes: B batch, H heads, T query tokens, V key tokens, S levels, d head width.

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def cross_layer_attention_reference(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    gate: Tensor | None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend to every level and mix the results by the gate.

    Args:
        q: queries [B, H, T, d].
        k: one [B, H, V, d] tensor a level.
        v: as `k`.
        gate: weight of each level, [B, T, H, S]; None weighs all levels equally.
        key_padding_mask: [B, V], True where a key may be read; a sample without any gives zeros.
        dropout_p: probability of dropping an attention weight.

    Returns:
        [B, H, T, d] in q's dtype.
    """
    num_levels = len(k)
    batch, heads, tokens, width = q.shape
    mask, any_key = None, None
    if key_padding_mask is not None:
        # A softmax over nothing is NaN in some backends: such rows read all keys and are zeroed afterwards.
        any_key = key_padding_mask.any(dim=-1)
        mask = (key_padding_mask | ~any_key[:, None])[:, None, None, :]
    if num_levels == 1:
        levels = scaled_dot_product_attention(q, k[0], v[0], attn_mask=mask, dropout_p=dropout_p)[:, None]
    else:
        stacked_q = q[:, None].expand(-1, num_levels, -1, -1, -1).reshape(batch, num_levels * heads, tokens, width)
        levels = scaled_dot_product_attention(
            stacked_q, torch.cat(list(k), dim=1), torch.cat(list(v), dim=1), attn_mask=mask, dropout_p=dropout_p
        ).view(batch, num_levels, heads, tokens, width)
    if gate is None:
        out = levels.mean(dim=1)
    else:
        out = torch.einsum("bshtd,bths->bhtd", levels, gate.to(levels.dtype))
    if any_key is not None:
        out = out * any_key[:, None, None, None]
    return out
