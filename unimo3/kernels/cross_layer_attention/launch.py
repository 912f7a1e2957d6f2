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
from collections.abc import Callable, Iterator, Sequence
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
# Bytes that a thread loads at once.
ALIGNMENT = 16
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


# Kernels compiled for a kind of call, by its `_Arguments.kind` and the current device, with their constants.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], int]] = {}


class _Arguments:
    """What all kernels of a pass take."""

    def __init__(self, inputs: Inputs):
        q = dense_rows(inputs.q)
        keys, values = tuple(map(dense_rows, inputs.k)), tuple(map(dense_rows, inputs.v))
        # A missing tensor is never read, but the kernel needs some pointer for it.
        masks = tuple(dense_rows(mask).view(torch.uint8) for mask in inputs.masks) or (q,) * len(keys)
        gate = q if inputs.gate is None else inputs.gate
        seed = q if inputs.seed is None else inputs.seed
        self.tensors = (q, keys, values, gate, masks)
        self.strides = (
            q.stride(),
            tuple([key.stride() for key in keys]),
            tuple([value.stride() for value in values]),
            gate.stride(),
            tuple([mask.stride(0) for mask in masks]),
        )
        self.lengths = tuple([key.shape[2] for key in keys])
        self.longest = max(self.lengths)
        batch, heads, self.queries, self.width = q.shape
        self.pairs = batch * heads
        self.sizes = (self.lengths, self.longest, heads, self.queries, self.width**-0.5, seed, inputs.dropout_p)
        self.device, self._pointers = q.device, (q, *keys, *values, gate, *masks)
        self._flags = (inputs.gate is not None, bool(inputs.masks), inputs.dropout_p > 0)
        self._kind = (q.dtype, gate.dtype, self._flags, self.lengths, heads, self.queries, self.strides)

    def constants(self) -> dict[str, Any]:
        """The kernels' compile-time constants, but for the blocks."""
        has_gate, has_mask, dropout = self._flags
        return {
            "LEVELS": len(self.lengths),
            "WIDTH": self.width,
            "BLOCK_D": triton.next_power_of_2(self.width),
            "HAS_GATE": has_gate,
            "HAS_MASK": has_mask,
            "DROPOUT": dropout,
            # Half types multiply as they are; float32 is not to be cut to TF32.
            "PRECISION": "ieee",
        }

    def launch(self, name: str, tensors: Sequence[Any], strides: Sequence[Any]) -> None:
        """Run a kernel of `KERNELS`, a program a block of queries, or of keys for ``backward_key``.

        Args:
            tensors: the kernel's own, after the shared ones.
            strides: the same.
        """
        arguments = (*self.tensors, *tensors, *self.strides, *strides, *self.sizes)
        with on_device(self.device):
            if os.environ.get(AUTOTUNE) == "1":
                self._tune(name, arguments)
                return
            # Triton compiles again for other alignments of pointers: the cached kernel is for 16 bytes.
            aligned = all(pointer.data_ptr() % ALIGNMENT == 0 for pointer in (*self._pointers, *_flat(tensors)))
            kind = (name, self.device.index, self._kind, *strides)
            known = _compiled.get(kind) if aligned else None
            if known:
                compiled, constants, blocks = known
                compiled[self.pairs, blocks, 1](*arguments, *constants)
                return
            entry = blocks_for(name, self.tensors[0], self.longest)
            constants = {**self.constants(), "BLOCK_T": entry.queries, "BLOCK_V": entry.keys}
            blocks = self._blocks(name, constants)
            function = _FUNCTIONS[name]
            compiled = function[self.pairs, blocks](
                *arguments, **constants, num_warps=entry.warps, num_stages=entry.stages
            )
            # The interpreter compiles nothing.
            if aligned and compiled is not None:
                order = tuple(constants[argument] for argument in function.arg_names if argument in constants)
                _compiled[kind] = compiled, order, blocks

    def _blocks(self, name: str, constants: dict[str, Any]) -> int:
        if name == "backward_key":
            return triton.cdiv(self.longest, constants["BLOCK_V"])
        return triton.cdiv(self.queries, constants["BLOCK_T"])

    def _tune(self, name: str, arguments: tuple[Any, ...]) -> None:
        tuner = _tuner(name)
        known = len(tuner.cache)
        # (sample, head) pairs first: the second axis ends at 65,535.
        tuner[lambda constants: (self.pairs, self._blocks(name, constants))](*arguments, **self.constants())
        if len(tuner.cache) > known:
            log.info("%s: T %d, V %d, %s: %s", name, self.queries, self.longest, self.constants(), tuner.best_config)


def _flat(tensors: Sequence[Any]) -> Iterator[Tensor]:
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            yield tensor
        else:
            yield from tensor


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
    _Arguments(inputs).launch("forward", outputs, [outputs.out.stride()])


def _fill_grads(inputs: Inputs, grad_out: Tensor, lse: Tensor, grads: Grads) -> None:
    arguments = _Arguments(inputs)
    own = (grad_out, lse, grads.q, grads.offsets)
    arguments.launch("backward_query", own, [grad_out.stride(), grads.q.stride()])
    if arguments.longest:
        own = (grad_out, lse, grads.offsets, tuple(grads.k), tuple(grads.v))
        arguments.launch("backward_key", own, [grad_out.stride()])


_attend = make_operator("cross_layer_attention_triton", _fill_outputs, _fill_grads)


def attend(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    gate: Tensor | None,
    masks: Sequence[Tensor] | None,
    dropout_p: float,
) -> Tensor:
    """As `cross_layer_attention_reference`. Inputs that Triton could only load in small pieces are copied, once."""
    if not torch.compiler.is_compiling() and not q.is_meta:
        q, k, v = _aligned(q), [*map(_aligned, k)], [*map(_aligned, v)]
    return _attend(q, k, v, gate, masks, dropout_p)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one whose rows start at no multiple of `ALIGNMENT` bytes."""
    piece = ALIGNMENT // tensor.element_size()
    aligned = tensor.data_ptr() % ALIGNMENT == 0 and all(stride % piece == 0 for stride in tensor.stride()[:-1])
    return tensor if aligned else tensor.clone(memory_format=torch.contiguous_format)
