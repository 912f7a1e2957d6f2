"""A call with one level by PyTorch's attention, which a setting of blocks.py may choose for it on a GPU.

Its dropout draws other bits than the kernels', and some of its backward passes give other bits on a second run.

Source: torch.nn.functional.scaled_dot_product_attention.
"""

# Shapes: B batch, H heads, T queries, V keys, d head width.

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend_one_level(q: Tensor, level: Tensor, gate: Tensor | None, mask: Tensor | None, dropout_p: float) -> Tensor:
    """As `cross_layer_attention` with this level alone; the mask is [B, V]."""
    key, value = level.transpose(1, 3).unbind(2)  # [B, H, V, d]
    read, any_key = None, None
    if mask is not None:
        # A softmax over nothing is NaN: such rows read all keys and are zeroed afterwards.
        any_key = mask.any(dim=-1)[:, None, None, None]
        read = mask[:, None, None, :] | ~any_key
    out = scaled_dot_product_attention(q.transpose(1, 2), key, value, read, dropout_p)
    if gate is not None:
        out = out * gate.to(q.dtype).transpose(1, 2)  # [B, H, T, 1]
    if any_key is not None:
        out = out * any_key
    return out.transpose(1, 2)
