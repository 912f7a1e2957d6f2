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

from unimo3.kernels.cross_layer_attention import kernel
from unimo3.kernels.cross_layer_attention.blocks import KERNELS, backward_kernels, blocks_for, forward_kernel
from unimo3.kernels.cross_layer_attention.dropout import threshold, words_by_query_and_key
from unimo3.kernels.cross_layer_attention.op import Grads, Inputs, Outputs, make_operator

log = logging.getLogger(__name__)

# Multiply and add in one instruction, whatever triton's version takes for its default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

AUTOTUNE = "UNIMO3_AUTOTUNE"
FUNCTIONS = {name: getattr(kernel, f"{name}_kernel") for name in KERNELS}
# Kernels compiled for a kind of call, with their constants in order and their programs a (sample, head) pair.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], int]] = {}


class _Pass:
    """What the kernels of one pass share."""

    def __init__(self, inputs: Inputs):
        q, levels = inputs.q, tuple(inputs.levels)
        batch, self.queries, heads, self.width = q.shape
        self.q, self.pairs = q, batch * heads
        self.lengths = tuple([level.shape[1] for level in levels])
        self.longest = max(self.lengths)
        if 2 * max(self.longest, self.queries) * heads * self.width >= 2**31:
            raise ValueError(
                f"q: {self.queries} queries, up to {self.longest} keys; below 2^31 values a sample are needed"
            )
        # A missing tensor is never read, but the kernel needs some pointer for it.
        masks = tuple([mask.view(torch.uint8) for mask in inputs.masks]) or (q,)
        gate = q if inputs.gate is None else inputs.gate
        bits = q if inputs.bits is None else inputs.bits
        self.tensors = (q, levels, gate, masks if len(masks) == len(levels) else masks * len(levels), bits)
        self.num_masks = len(inputs.masks)
        self.has_gate, self.has_bits = inputs.gate is not None, inputs.bits is not None
        self.sizes = (self.lengths, self.longest, heads, self.queries, self.width**-0.5, inputs.dropout_p)
        # What triton compiles for. All tensors start at multiples of 16 bytes.
        self.kind = (
            q.dtype,
            gate.dtype,
            q.device.index,
            self.has_gate,
            self.num_masks,
            self.has_bits,
            self.lengths,
            heads,
            self.queries,
            self.width,
        )

    def constants(self) -> dict[str, Any]:
        """The kernels' compile-time constants, but for the blocks."""
        return {
            "LEVELS": len(self.lengths),
            "WIDTH": self.width,
            "BLOCK_D": triton.next_power_of_2(self.width),
            "HAS_GATE": self.has_gate,
            "HAS_MASK": self.num_masks > 0,
            "DROPOUT": self.has_bits,
            # Half types multiply as they are; float32 is not to be cut to TF32.
            "PRECISION": "ieee",
        }

    def launch(self, name: str, *tensors: Any) -> None:
        """Run a kernel of `KERNELS` with its own tensors, which follow the shared ones."""
        arguments = (*self.tensors, *tensors, *self.sizes)
        with on_device(self.q.device):
            if os.environ.get(AUTOTUNE) == "1":
                self._tune(name, arguments)
            elif (name, self.kind) in _compiled:
                compiled, constants, programs = _compiled[name, self.kind]
                compiled[self.pairs * programs, 1, 1](*arguments, *constants)
            else:
                self._compile(name, arguments)

    def _compile(self, name: str, arguments: tuple[Any, ...]) -> None:
        entry = blocks_for(name, self.q, self.longest, self.has_bits)
        constants = {**self.constants(), "BLOCK_T": entry.queries, "BLOCK_V": entry.keys}
        programs, function = self._programs(name, constants), FUNCTIONS[name]
        compiled = function[self.pairs * programs,](
            *arguments, **constants, num_warps=entry.warps, num_stages=entry.stages
        )
        # The interpreter compiles nothing.
        if compiled is not None:
            order = tuple(constants[argument] for argument in function.arg_names if argument in constants)
            _compiled[name, self.kind] = compiled, order, programs

    def _programs(self, name: str, constants: dict[str, Any]) -> int:
        """The number of programs of a (sample, head) pair."""
        if name == "backward_fused":
            return 1
        if name == "backward_key":
            return triton.cdiv(self.longest, constants["BLOCK_V"]) * len(self.lengths)
        return triton.cdiv(self.queries, constants["BLOCK_T"])

    def _tune(self, name: str, arguments: tuple[Any, ...]) -> None:
        tuner = _tuner(name)
        known = len(tuner.cache)
        tuner[lambda constants: (self.pairs * self._programs(name, constants),)](*arguments, **self.constants())
        if len(tuner.cache) > known:
            log.info("%s: T %d, V %d, %s: %s", name, self.queries, self.longest, self.constants(), tuner.best_config)


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
        candidates,
        key=key,
        cache_results=True,
        prune_configs_by={"early_config_prune": functools.partial(_worth_timing, name)},
        **timing,
    )(FUNCTIONS[name])


def _worth_timing(
    name: str, candidates: list[triton.Config], arguments: dict[str, Any], **_: Any
) -> list[triton.Config]:
    """Candidates without blocks far longer than the lengths; in float32 without those that take minutes to compile."""
    most = 64 if arguments["q"].element_size() > 2 else 128

    def fits(block: int, length: int, covered: bool) -> bool:
        enough = max(32, triton.next_power_of_2(length))
        return block <= min(most, enough) and (not covered or block >= length)

    return [
        candidate
        for candidate in candidates
        if fits(candidate.kwargs["BLOCK_T"], arguments["num_queries"], name == "backward_fused")
        and fits(candidate.kwargs["BLOCK_V"], arguments["longest"], name.endswith("_short"))
    ]


def _wall_time(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
    """Seconds of one call in triton's interpreter, for each quantile."""
    start = time.perf_counter()
    call()
    return [time.perf_counter() - start] * len(quantiles)


def _fill_outputs(inputs: Inputs, outputs: Outputs) -> None:
    run = _Pass(inputs)
    run.launch(forward_kernel(inputs.q, run.lengths, run.num_masks), *outputs)


def _fill_grads(inputs: Inputs, grad_out: Tensor, lse: Tensor, grads: Grads) -> None:
    run = _Pass(inputs)
    levels = tuple(grads.levels)
    tensors = {
        "backward_fused": (grads.q, grads.offsets, levels),
        "backward_query": (grads.q, grads.offsets),
        "backward_query_short": (grads.q, grads.offsets),
        "backward_key": (grads.offsets, levels),
    }
    for name in backward_kernels(inputs.q, run.lengths, run.num_masks):
        run.launch(name, grad_out, lse, *tensors[name])


def draw_bits(seed: Tensor, batch: int, heads: int, queries: int, longest: int, dropout_p: float) -> Tensor:
    """As `dropout.draw_bits`, by query and by key."""
    words, block = words_by_query_and_key(queries, longest), 256
    bits = torch.empty(batch, heads, words, dtype=torch.int32, device=seed.device)
    arguments = (bits, seed, longest, queries, batch * heads, threshold(dropout_p))
    kind = ("draw_bits", seed.device.index, *arguments[2:])
    with on_device(seed.device):
        if kind in _compiled:
            compiled, constants, programs = _compiled[kind]
            compiled[programs, 1, 1](*arguments, *constants)
            return bits
        programs = triton.cdiv(bits.numel(), block)
        compiled = kernel.draw_bits_kernel[programs,](*arguments, BLOCK=block)
        if compiled is not None:
            _compiled[kind] = compiled, (block,), programs
    return bits


attend = make_operator("cross_layer_attention_triton", draw_bits, words_by_query_and_key, _fill_outputs, _fill_grads)
