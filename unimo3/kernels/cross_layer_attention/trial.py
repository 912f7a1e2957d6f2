"""A trial of the Triton kernels on the GPU at hand, before anything is trusted to them.

A GPU, driver or triton they were never run with may refuse them or get them wrong. Each process asks once for a dtype
and head width, in a second or a few, and falls back to the reference with a warning.

Source: none; the C++ kernel's build falls back likewise.
"""

# Shapes: B batch, H heads, T queries, V keys of a level, d head width.

import functools
import logging
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from unimo3.kernels.cross_layer_attention.reference import cross_layer_attention_reference

log = logging.getLogger(__name__)

# Of the largest value: several times what rounding of inputs and probabilities makes.
_TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.05, torch.float32: 1e-4}


@torch.compiler.assume_constant_result
@functools.cache
def triton_works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernels give the reference's result and gradients on a device; a warning says why not.

    Args:
        width: of a head, d.
    """
    # A thread has modes, hooks and autocast of its own: what the caller has set, such as activation checkpointing's
    # hooks, must not see these tensors.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_succeeds, device, dtype, width).result()


def _succeeds(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    try:
        error, name = _largest_error(device, dtype, width)
    except Exception as reason:  # a compiler's, a driver's, or triton's own, of any type
        problem = f"they do not run: {type(reason).__name__}: {reason}"
    else:
        if error <= _TOLERANCE[dtype]:
            log.info("cross-layer attention: Triton kernels, which passed their trial with %s, width %d", dtype, width)
            return True
        problem = f"the {name} is {error:.2g} of its largest value off"
    log.warning(
        "cross-layer attention runs in plain operations, slower and with more memory: the Triton kernels failed their "
        "trial on %s with %s and head width %d; %s",
        torch.cuda.get_device_name(device) if device.type == "cuda" else device, dtype, width, problem,
    )  # fmt: skip
    return False


def _largest_error(device: torch.device, dtype: torch.dtype, width: int) -> tuple[float, str]:
    """The largest difference from the reference in float64, as a share of the largest value, and whose it is."""
    from unimo3.kernels.cross_layer_attention import launch

    # Its own generator: the run's draws stay as they are.
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()

    batch, heads, queries, lengths = 2, 2, 70, (131, 17)
    q = draw(batch, heads, queries, width)
    k, v = ([draw(batch, heads, keys, width) for keys in lengths] for _ in range(2))
    gate = draw(batch, queries, heads, len(lengths)).detach().float().softmax(-1).requires_grad_()
    masks = [torch.arange(keys, device=device) < torch.tensor([[keys], [keys // 2]], device=device) for keys in lengths]
    grad_out = draw(batch, heads, queries, width).detach()
    leaves = [q, *k, *v, gate]
    names = ["result", "gradient of q", *["gradient of k"] * 2, *["gradient of v"] * 2, "gradient of the gate"]

    out = launch.attend(q, k, v, gate, masks, 0.0)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]
    exact = cross_layer_attention_reference(
        q.double(), [key.double() for key in k], [value.double() for value in v], gate, masks, 0.0
    )
    wanted = [exact.detach().double(), *torch.autograd.grad(exact, leaves, grad_out.double())]
    errors = [
        float((ours.double() - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(found, wanted, strict=True)
    ]
    # A comparison that is no number is the worst.
    worst = max(range(len(errors)), key=lambda place: (errors[place] != errors[place], errors[place]))
    return errors[worst], names[worst]
