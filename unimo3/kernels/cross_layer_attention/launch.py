"""The Triton kernels, launched.

Source: kernel.py for what runs, op.py for how torch sees it.
"""

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
from unimo3.kernels.cross_layer_attention.op import Grads, Inputs, Outputs, dense_rows, make_operator


class _Call:
    """The arguments that all kernels share."""

    def __init__(self, inputs: Inputs):
        q, levels = dense_rows(inputs.q), len(inputs.k)
        self.pairs = q.shape[0] * q.shape[1]
        keys, values = tuple(map(dense_rows, inputs.k)), tuple(map(dense_rows, inputs.v))
        # What is not there is never read; some pointer has to stand for it.
        masks = tuple(dense_rows(mask).view(torch.uint8) for mask in inputs.masks) or (q,) * levels
        gate = q if inputs.gate is None else inputs.gate
        seed = q if inputs.seed is None else inputs.seed
        self.tensors = (q, keys, values, gate, masks)
        self.strides = (
            q.stride(),
            tuple(key.stride() for key in keys),
            tuple(value.stride() for value in values),
            gate.stride(),
            tuple(mask.stride(0) for mask in masks),
        )
        lengths, scale = tuple(key.shape[2] for key in keys), q.shape[-1] ** -0.5
        self.sizes = (lengths, inputs.longest, q.shape[1], q.shape[2], scale, seed, inputs.dropout_p)
        self._switches = {
            "LEVELS": levels,
            "WIDTH": q.shape[-1],
            "BLOCK_D": triton.next_power_of_2(q.shape[-1]),
            "HAS_GATE": inputs.gate is not None,
            "HAS_MASK": bool(inputs.masks),
            "DROPOUT": inputs.dropout_p > 0,
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


def _fill_outputs(inputs: Inputs, outputs: Outputs) -> None:
    call, blocks = _Call(inputs), blocks_for("forward", inputs.q)
    cross_layer_attention_fwd_kernel[triton.cdiv(inputs.q.shape[2], blocks.queries), call.pairs](
        *call.tensors, *outputs, *call.strides, outputs.out.stride(), *call.sizes, **call.constants(blocks)
    )


def _fill_grads(inputs: Inputs, grad_out: Tensor, lse: Tensor, grads: Grads) -> None:
    call, blocks = _Call(inputs), blocks_for("backward_query", inputs.q)
    cross_layer_attention_bwd_query_kernel[triton.cdiv(inputs.q.shape[2], blocks.queries), call.pairs](
        *call.tensors, grad_out, lse, grads.q, grads.offsets,
        *call.strides, grad_out.stride(), grads.q.stride(), *call.sizes, **call.constants(blocks),
    )  # fmt: skip
    if inputs.longest:
        blocks = blocks_for("backward_key", inputs.q)
        cross_layer_attention_bwd_key_kernel[triton.cdiv(inputs.longest, blocks.keys), call.pairs](
            *call.tensors, grad_out, lse, grads.offsets, tuple(grads.k), tuple(grads.v),
            *call.strides, grad_out.stride(), *call.sizes, **call.constants(blocks),
        )  # fmt: skip


attend = make_operator("cross_layer_attention_triton", _fill_outputs, _fill_grads)
