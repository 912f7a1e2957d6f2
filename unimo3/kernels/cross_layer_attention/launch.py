"""The Triton kernels, launched: with the blocks of the table, or with those that are fastest on this GPU.

``UNIMO3_AUTOTUNE=1`` has triton time every candidate at the first call of each kind and keep the result in its cache.
A run that tunes again may take other blocks, and so other roundings: leave it off where runs are to be bitwise equal.

Source: kernel.py for what runs, op.py for how torch sees it; triton.autotune.
"""

import functools
import itertools
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from unimo3.kernels.cross_layer_attention.blocks import KERNELS, blocks_for
from unimo3.kernels.cross_layer_attention.kernel import (
    cross_layer_attention_bwd_key_kernel,
    cross_layer_attention_bwd_query_kernel,
    cross_layer_attention_fwd_kernel,
)
from unimo3.kernels.cross_layer_attention.op import Grads, Inputs, Outputs, dense_rows, make_operator

log = logging.getLogger(__name__)

# Multiply and add in one instruction, whatever triton's version takes for its default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

AUTOTUNE = "UNIMO3_AUTOTUNE"
_FUNCTIONS = dict(
    zip(
        KERNELS,
        (
            cross_layer_attention_fwd_kernel,
            cross_layer_attention_bwd_query_kernel,
            cross_layer_attention_bwd_key_kernel,
        ),
        strict=True,
    )
)


class _Call:
    """The arguments that all kernels share."""

    def __init__(self, inputs: Inputs):
        q, levels = dense_rows(inputs.q), len(inputs.k)
        self.pairs = q.shape[0] * q.shape[1]
        keys, values = tuple(map(dense_rows, inputs.k)), tuple(map(dense_rows, inputs.v))
        # A missing tensor is never read, but the kernel needs some pointer for it.
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
        self._inputs = inputs
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

    def launch(self, name: str, *arguments: Any) -> None:
        """Run a kernel of `KERNELS`, a program a block of queries, or of keys for ``backward_key``."""
        queries, longest = self._inputs.q.shape[2], self._inputs.longest

        def grid(constants: dict[str, Any]) -> tuple[int, int]:
            # (sample, head) pairs first: the second axis ends at 65,535.
            if name == "backward_key":
                return self.pairs, triton.cdiv(longest, constants["BLOCK_V"])
            return self.pairs, triton.cdiv(queries, constants["BLOCK_T"])

        with on_device(self._inputs.q.device):
            if os.environ.get(AUTOTUNE) == "1":
                tuner = _tuner(name)
                known = len(tuner.cache)
                tuner[grid](*arguments, *self.sizes, **self._switches)
                if len(tuner.cache) > known:
                    log.info("%s: T %d, V %d, %s: %s", name, queries, longest, self._switches, tuner.best_config)
                return
            blocks = blocks_for(name, self._inputs.q, longest)
            _FUNCTIONS[name][grid](
                *arguments,
                *self.sizes,
                **self._switches,
                BLOCK_T=blocks.queries,
                BLOCK_V=blocks.keys,
                num_warps=blocks.warps,
                num_stages=blocks.stages,
            )


def on_device(device: torch.device) -> AbstractContextManager:
    """Make a GPU the current one, on which triton launches; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _tuner(name: str) -> Any:
    """A kernel that times its candidates for each kind of call."""
    sizes = (32, 64, 128)
    candidates = [
        triton.Config({"BLOCK_T": block_t, "BLOCK_V": block_v}, num_warps=warps, num_stages=stages)
        for block_t, block_v, warps, stages in itertools.product(sizes, sizes, (4, 8), (2, 3))
    ]
    # What a kernel is compiled for, and the lengths; triton adds the dtypes.
    key = ["num_queries", "longest", "LEVELS", "WIDTH", "HAS_GATE", "HAS_MASK", "DROPOUT"]
    timing = {} if torch.cuda.is_available() else {"do_bench": _wall_time}
    return triton.autotune(
        candidates, key=key, cache_results=True, prune_configs_by={"early_config_prune": _worth_timing}, **timing
    )(_FUNCTIONS[name])


def _worth_timing(candidates: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    """Candidates without blocks far longer than the lengths; in float32 without those that take minutes to compile."""
    most = 64 if arguments["q"].element_size() > 2 else 128

    def fits(block: int, length: int) -> bool:
        return block <= min(most, max(32, triton.next_power_of_2(length)))

    return [
        candidate
        for candidate in candidates
        if fits(candidate.kwargs["BLOCK_T"], arguments["num_queries"])
        and fits(candidate.kwargs["BLOCK_V"], arguments["longest"])
    ]


def _wall_time(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
    """Of one call in triton's interpreter, for each quantile."""
    start = time.perf_counter()
    call()
    return [time.perf_counter() - start] * len(quantiles)


def _fill_outputs(inputs: Inputs, outputs: Outputs) -> None:
    call = _Call(inputs)
    call.launch("forward", *call.tensors, *outputs, *call.strides, outputs.out.stride())


def _fill_grads(inputs: Inputs, grad_out: Tensor, lse: Tensor, grads: Grads) -> None:
    call = _Call(inputs)
    call.launch(
        "backward_query",
        *call.tensors,
        grad_out,
        lse,
        grads.q,
        grads.offsets,
        *call.strides,
        grad_out.stride(),
        grads.q.stride(),
    )
    if inputs.longest:
        call.launch(
            "backward_key",
            *call.tensors,
            grad_out,
            lse,
            grads.offsets,
            tuple(grads.k),
            tuple(grads.v),
            *call.strides,
            grad_out.stride(),
        )


attend = make_operator("cross_layer_attention_triton", _fill_outputs, _fill_grads)
