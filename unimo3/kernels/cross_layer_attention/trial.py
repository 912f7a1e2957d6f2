"""A trial of the Triton kernels on this GPU, before anything is trusted to them.

A GPU, driver or triton they were never run with may refuse them or get them wrong. Each process tries a dtype and
head width once, in some seconds, and falls back to the reference with a warning. A trial cannot catch an illegal memory
access, after which a process cannot use its GPU any more.

Source: none; the C++ kernel's build falls back in the same way.
"""

# Shapes: B batch, H heads, T queries, V keys of a level, d head width.

import functools
import logging
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from unimo3.kernels.cross_layer_attention.reference import cross_layer_attention_reference

log = logging.getLogger(__name__)

# Fractions of the largest value: several times what rounding of inputs and probabilities makes.
_TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.05, torch.float32: 1e-4}
# T and the V of each level, so that each kernel of the table runs: long and short queries with long and short keys.
_LENGTHS = ((70, (131, 17)), (70, (20,)), (9, (131,)), (9, (20,)))


@torch.compiler.assume_constant_result
def triton_works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernels give the reference's results and gradients on a device; a warning has the reason.

    Args:
        width: of a head, d.
    """
    return tried(device, dtype, width)


# A separate function: what torch.compile is to take for a constant must be a plain one.
@functools.cache
def tried(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """`triton_works`, once for each kind."""
    # A thread has separate modes, hooks and autocast: what the caller has set, such as activation checkpointing's
    # hooks, must not see these tensors.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_succeeds, device, dtype, width).result()


def _succeeds(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    try:
        problem = _problem(device, dtype, width)
    except Exception as reason:  # a compiler's, a driver's, or triton's own, of any type
        problem = f"they do not run: {type(reason).__name__}: {reason}"
    if not problem:
        log.info("cross-layer attention: the Triton kernels passed their trial with %s, width %d", dtype, width)
        return True
    log.warning(
        "cross-layer attention runs in plain operations, slower and with more memory: the Triton kernels failed their "
        "trial on %s with %s and head width %d; %s",
        torch.cuda.get_device_name(device) if device.type == "cuda" else device,
        dtype,
        width,
        problem,
    )
    return False


def _problem(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """The problem; empty if there is none."""
    from unimo3.kernels.cross_layer_attention import launch

    # A thread begins on the first GPU, whichever GPU its process uses.
    with launch.on_device(device):
        for queries, lengths in _LENGTHS:
            error, name = _largest_error(device, dtype, width, queries, lengths)
            if not error <= _TOLERANCE[dtype]:
                return f"the {name} is {error:.2g} of its largest value off (T {queries}, V {lengths})"
            if not _is_finite_with_dropout(device, dtype, width, queries, lengths):
                return f"with dropout a value is not finite (T {queries}, V {lengths})"
    return ""


class _Drawn:
    """Inputs and a gradient of the result, from a separate generator: the run's draws stay the same."""

    def __init__(self, device: torch.device, dtype: torch.dtype, width: int, queries: int, lengths: tuple[int, ...]):
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()

        batch, heads = 2, 2
        self.q = draw(batch, queries, heads, width)
        self.levels = [draw(batch, keys, 2, heads, width) for keys in lengths]
        weights = draw(batch, queries, heads, len(lengths)).detach().float().softmax(-1)
        self.gate = weights.requires_grad_()
        self.masks = [
            torch.arange(keys, device=device) < torch.tensor([[keys], [keys // 2]], device=device) for keys in lengths
        ]
        self.grad_out = draw(batch, queries, heads, width).detach()
        self.leaves = [self.q, *self.levels, self.gate]
        self.names = ["result", "gradient of q", *["gradient of a level"] * len(lengths), "gradient of the gate"]


def _largest_error(
    device: torch.device, dtype: torch.dtype, width: int, queries: int, lengths: tuple[int, ...]
) -> tuple[float, str]:
    """The largest difference from the reference in float64, as a fraction of the largest value, and its name."""
    from unimo3.kernels.cross_layer_attention import launch

    inputs = _Drawn(device, dtype, width, queries, lengths)
    out = launch.attend(inputs.q, inputs.levels, inputs.gate, inputs.masks, 0.0)
    results = [out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.grad_out)]
    levels = [level.double() for level in inputs.levels]
    exact = cross_layer_attention_reference(inputs.q.double(), levels, inputs.gate, inputs.masks)
    expected = [exact.detach(), *torch.autograd.grad(exact, inputs.leaves, inputs.grad_out.double())]
    errors = [
        float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
        for ours, theirs in zip(results, expected, strict=True)
    ]
    # A comparison that is no number is the worst.
    worst = max(range(len(errors)), key=lambda index: (errors[index] != errors[index], errors[index]))
    return errors[worst], inputs.names[worst]


def _is_finite_with_dropout(
    device: torch.device, dtype: torch.dtype, width: int, queries: int, lengths: tuple[int, ...]
) -> bool:
    from unimo3.kernels.cross_layer_attention import launch

    inputs = _Drawn(device, dtype, width, queries, lengths)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        out = launch.attend(inputs.q, inputs.levels, inputs.gate, inputs.masks, 0.1)
    return all(bool(x.isfinite().all()) for x in (out, *torch.autograd.grad(out, inputs.leaves, inputs.grad_out)))
