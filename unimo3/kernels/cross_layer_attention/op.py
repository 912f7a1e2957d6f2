"""The Triton kernels as one operator of torch: launching, shapes without values, and the gradient.

As an operator it is opaque to ``torch.compile``, and activation checkpointing, autocast and ZeRO-3 work around it as
around any other.

Source: torch.library's custom operators; kernel.py for what runs.
"""

# Shapes: B batch, H heads, T queries, V keys of a level, S levels, d head width.

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from unimo3.kernels.cross_layer_attention.blocks import Blocks, blocks_for
from unimo3.kernels.cross_layer_attention.kernel import (
    cross_layer_attention_bwd_key_kernel,
    cross_layer_attention_bwd_query_kernel,
    cross_layer_attention_fwd_kernel,
)


def attend(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    gate: Tensor | None,
    key_padding_masks: Sequence[Tensor] | None,
    dropout_p: float,
) -> Tensor:
    """What the reference computes, of tensors that the kernels serve; a mask [B, V] for each level, or none at all."""
    # A tensor, drawn where q is: nothing waits for its value, and checkpointing draws the same again.
    seed = torch.randint(2**31 - 1, (1,), device=q.device) if dropout_p > 0 else None
    masks = [] if key_padding_masks is None else list(key_padding_masks)
    out: Tensor = _forward(q, list(k), list(v), gate, masks, seed, dropout_p)[0]
    return out


@torch.library.custom_op("unimo3::cross_layer_attention", mutates_args=())
def _forward(
    q: Tensor, k: list[Tensor], v: list[Tensor], gate: Tensor | None, masks: list[Tensor], seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _empty_outputs(q, k)
    if out.numel():
        call = _Call(q, k, v, gate, masks, seed, dropout_p)
        blocks = blocks_for("forward", q)
        grid = (triton.cdiv(q.shape[2], blocks.queries), q.shape[0] * q.shape[1])
        cross_layer_attention_fwd_kernel[grid](
            call.q, call.k, call.v, call.gate, call.masks, out, lse,
            *call.strides, out.stride(), *call.sizes, **call.constants(blocks),
        )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, k)


@torch.library.custom_op("unimo3::cross_layer_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor, q: Tensor, k: list[Tensor], v: list[Tensor], gate: Tensor | None, masks: list[Tensor],
    lse: Tensor, seed: Tensor | None, dropout_p: float,
) -> list[Tensor]:  # fmt: skip
    grads = _empty_grads(q, k, v, lse)
    grad_q, offsets, *grad_levels = grads
    if grad_q.numel():
        call = _Call(q, k, v, gate, masks, seed, dropout_p)
        grad_out = _dense_rows(grad_out)
        pairs, (grad_k, grad_v) = q.shape[0] * q.shape[1], (grad_levels[: len(k)], grad_levels[len(k) :])
        blocks = blocks_for("backward_query", q)
        cross_layer_attention_bwd_query_kernel[triton.cdiv(q.shape[2], blocks.queries), pairs](
            call.q, call.k, call.v, call.gate, call.masks, grad_out, lse, grad_q, offsets,
            *call.strides, grad_out.stride(), grad_q.stride(), *call.sizes, **call.constants(blocks),
        )  # fmt: skip
        blocks = blocks_for("backward_key", q)
        if call.longest:
            cross_layer_attention_bwd_key_kernel[triton.cdiv(call.longest, blocks.keys), pairs](
                call.q, call.k, call.v, call.gate, call.masks, grad_out, lse, offsets, tuple(grad_k), tuple(grad_v),
                *call.strides, grad_out.stride(), *call.sizes, **call.constants(blocks),
            )  # fmt: skip
    else:
        for grad in grad_levels:
            grad.zero_()
    return grads


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: list[Tensor], v: list[Tensor], gate: Any, masks: Any, lse: Tensor, *_: Any):
    return _empty_grads(q, k, v, lse)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, gate, masks, seed, ctx.dropout_p = inputs
    ctx.num_levels, ctx.num_masks = len(k), len(masks)
    ctx.save_for_backward(q, gate, seed, output[1], *k, *v, *masks)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_out: Tensor, _: Any) -> tuple:
    q, gate, seed, lse, *rest = ctx.saved_tensors
    k, v, masks = rest[: ctx.num_levels], rest[ctx.num_levels : 2 * ctx.num_levels], rest[2 * ctx.num_levels :]
    grad_q, offsets, *grads = _backward(grad_out, q, k, v, gate, masks, lse, seed, ctx.dropout_p)
    # D [B, H, S, T] is the gradient of the gate [B, T, H, S].
    grad_gate = None if gate is None else offsets.permute(0, 3, 1, 2).to(gate.dtype)
    return grad_q, grads[: ctx.num_levels], grads[ctx.num_levels :], grad_gate, [None] * ctx.num_masks, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _empty_outputs(q: Tensor, k: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = q.shape
    return _like_projection(q), q.new_empty(batch, heads, len(k), tokens, dtype=torch.float32)


def _empty_grads(q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], lse: Tensor) -> list[Tensor]:
    levels = [level.new_empty(level.shape) for level in (*k, *v)]
    return [_like_projection(q), torch.empty_like(lse), *levels]


def _like_projection(q: Tensor) -> Tensor:
    """An empty [B, H, T, d] that lies in memory as [B, T, H d], as linear maps give and take it."""
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Call:
    """The arguments that all kernels share."""

    def __init__(
        self, q: Tensor, k: list[Tensor], v: list[Tensor], gate: Tensor | None, masks: list[Tensor],
        seed: Tensor | None, dropout_p: float,
    ):  # fmt: skip
        self.q = _dense_rows(q)
        self.k, self.v = tuple(map(_dense_rows, k)), tuple(map(_dense_rows, v))
        self.masks = tuple(_dense_rows(mask).view(torch.uint8) for mask in masks) or (self.q,) * len(k)
        self.gate = self.q if gate is None else gate
        self.strides = (
            self.q.stride(),
            tuple(level.stride() for level in self.k),
            tuple(level.stride() for level in self.v),
            self.gate.stride(),
            tuple(mask.stride(0) for mask in self.masks),
        )
        self.longest = max(level.shape[2] for level in k)
        lengths = tuple(level.shape[2] for level in k)
        scale = q.shape[-1] ** -0.5
        self.sizes = (lengths, self.longest, q.shape[1], q.shape[2], scale, self.q if seed is None else seed, dropout_p)
        self._switches = {
            "LEVELS": len(k),
            "WIDTH": q.shape[-1],
            "BLOCK_D": triton.next_power_of_2(q.shape[-1]),
            "HAS_GATE": gate is not None,
            "HAS_MASK": bool(masks),
            "DROPOUT": dropout_p > 0,
            # Half types multiply as they are; float32 is not to be cut to TF32.
            "PRECISION": "ieee",
        }

    def constants(self, blocks: Blocks) -> dict[str, Any]:
        """What a kernel is compiled for."""
        return self._switches | {
            "BLOCK_T": blocks.queries,
            "BLOCK_V": blocks.keys,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }
