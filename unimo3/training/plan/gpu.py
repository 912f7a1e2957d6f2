"""Runs a step on the meta device with the operations of a GPU, which save other tensors than those of a CPU.

- Attention is one kernel that saves a log-sum-exp a query instead of the weights, [T, V] a head: torch's
  memory-efficient one.
- Dropout saves a mask of one byte an element.

Cross-layer attention is an operator of ours, whose GPU kernel registers its own shapes.

Where an operation reads values, the general case is counted: texts are padded, negatives are drawn from equal
similarities.

Source: FlashAttention, arXiv 2205.14135; torch's scaled_dot_product_attention.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

_attend = torch.ops.aten._scaled_dot_product_efficient_attention


class GpuFunctions(TorchFunctionMode):
    """Inside, tensors on the meta device run a GPU's operations."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is torch.nn.functional.dropout:
            return _dropout(*args, **kwargs)
        if func is Tensor.__bool__ and args[0].is_meta:
            return False  # of masks: whether all tokens are real
        if func is Tensor.cpu and args[0].is_meta:
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        # Only indices have values; with a tensor without values they lose them.
        if func is not Tensor.__getitem__ and len({tensor.is_meta for tensor in _tensors(args, kwargs)}) == 2:
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


def _tensors(args: tuple, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for value in itertools.chain(args, kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, dict)):  # seldom, and slow
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    bias = None
    if attn_mask is not None:
        # The kernel adds its mask to the scores.
        bias = torch.empty(attn_mask.shape, dtype=q.dtype, device=q.device).expand(*q.shape[:3], k.shape[2])
    out: Tensor = _attend(q, k, v, bias, q.requires_grad, dropout_p, is_causal, scale=scale)[0]
    return out


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, training)[0] if training and p else x
