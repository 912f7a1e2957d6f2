"""Cross-layer attention: the one operation in which a token reads several levels of the other modality."""

# Shapes: B batch, H heads, T queries, V keys of a level, S levels, d head width. As FlashAttention's packed keys and
# values, and as linear maps give them: [B, T, H, d] and [B, V, 2, H, d].

import functools
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from unimo3.kernels.cross_layer_attention import blocks, native
from unimo3.kernels.cross_layer_attention.dropout import draw_bits, draw_seed
from unimo3.kernels.cross_layer_attention.one_level import attend_one_level
from unimo3.kernels.cross_layer_attention.op import longest_of
from unimo3.kernels.cross_layer_attention.reference import cross_layer_attention_reference
from unimo3.kernels.cross_layer_attention.trial import triton_works

__all__ = ["cross_layer_attention", "cross_layer_attention_reference"]

IMPLEMENTATIONS = ("triton", "native", "reference")
# What the Triton kernels support.
HEAD_WIDTHS = (32, 64, 96, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WHAT = {"triton": "Triton kernels", "native": "the C++ kernel", "reference": "plain operations (reference)"}

log = logging.getLogger(__name__)


def cross_layer_attention(
    q: Tensor,
    levels: Sequence[Tensor],
    gate: Tensor | None,
    key_padding_mask: Tensor | Sequence[Tensor] | None = None,
    impl: str | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend to every level and mix the results by the gate.

        C_i = softmax(q K_i^T / sqrt(d) + padding) V_i,    out = sum_i g_i C_i

    Args:
        q: queries [B, T, H, d].
        levels: keys and values, one [B, V_i, 2, H, d] tensor a level; lengths may differ.
        gate: weight of each level, [B, T, H, S]; None weighs all levels equally.
        key_padding_mask: [B, V], True where a key may be read, the same for all levels; or one [B, V_i] a level. A
            level of which a sample has no readable key adds zeros.
        impl: ``triton``, for CUDA tensors of head width 32, 64, 96 or 128 (CPU tensors under TRITON_INTERPRET=1);
            ``native``, the C++ kernel for float32 on CPUs; ``reference``, for everything. None: by the device, the
            first of these that supports; ``triton`` after a trial on this GPU.
        dropout_p: probability of dropping an attention weight; a query drops the n-th key at all levels or at none.

    Returns:
        [B, T, H, d] in q's dtype.

    Raises:
        ValueError: the tensors do not fit together, or `impl` does not support them.
    """
    _check(q, levels, gate, key_padding_mask, dropout_p)
    masks = [key_padding_mask] if isinstance(key_padding_mask, Tensor) else key_padding_mask
    chosen = _choose(impl, q)
    if not torch.compiler.is_compiling():
        _log_choice(chosen, q.device.type, q.dtype)
    if chosen == "triton":
        if blocks.ONE_LEVEL_BY_TORCH and len(levels) == 1 and levels[0].shape[1]:
            return attend_one_level(q, levels[0], gate, masks[0] if masks else None, dropout_p)
        # Imported where it is used: it takes a second, and machines without a GPU have no use for it.
        from unimo3.kernels.cross_layer_attention import launch

        return launch.attend(q, levels, gate, masks, dropout_p)
    if chosen == "native":
        return native.attend(q, levels, gate, masks, dropout_p)
    bits = None
    if dropout_p > 0:
        batch, queries, heads, _ = q.shape
        bits = draw_bits(draw_seed(q.device), batch, heads, queries, longest_of(levels), dropout_p)
    return cross_layer_attention_reference(q, levels, gate, masks, bits, dropout_p)


@functools.cache
def _log_choice(chosen: str, device: str, dtype: torch.dtype) -> None:
    """Log once for each kind."""
    log.info("cross-layer attention: %s, for %s on %s", _WHAT[chosen], dtype, device)


def _choose(impl: str | None, q: Tensor) -> str:
    if impl not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"impl: '{impl}'; one of {', '.join(IMPLEMENTATIONS)} is supported")
    if impl is None:
        if native.supports(q):
            return "native"
        return (
            "triton"
            if q.is_cuda and _triton_supports(q) and triton_works(q.device, q.dtype, q.shape[-1])
            else "reference"
        )
    supporting = {"triton": _triton_supports, "native": native.supports, "reference": lambda q: True}
    if not supporting[impl](q):
        needed = {
            "triton": "float16, bfloat16 or float32 on a GPU (on a CPU under TRITON_INTERPRET=1) and a head width of "
            f"{', '.join(map(str, HEAD_WIDTHS))}",
            "native": f"float32 on a CPU, a head width of a multiple of {native.WIDTH_MULTIPLE} and a C++ compiler",
        }[impl]
        raise ValueError(f"impl: '{impl}' with q of {q.dtype} on {q.device}, head width {q.shape[-1]}; needs {needed}")
    return impl


def interprets_triton() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_supports(q: Tensor) -> bool:
    # On the meta device there is nothing to run.
    runs = q.is_cuda or q.is_meta or (q.device.type == "cpu" and interprets_triton())
    return runs and q.dtype in DTYPES and q.shape[-1] in HEAD_WIDTHS


def _check(
    q: Tensor,
    levels: Sequence[Tensor],
    gate: Tensor | None,
    masks: Tensor | Sequence[Tensor] | None,
    dropout_p: float,
) -> None:
    if isinstance(levels, Tensor) or not isinstance(levels, Sequence) or not levels:
        kind = "none" if isinstance(levels, Sequence) and not levels else f"a {type(levels).__name__}"
        raise ValueError(f"levels: {kind}; a list of one [B, V, 2, H, d] tensor a level is needed")
    each_mask = [masks] * len(levels) if isinstance(masks, Tensor) else masks
    for name, tensors in (("q", [q]), ("levels", levels), ("gate", [gate]), ("key_padding_mask", each_mask or ())):
        for tensor in tensors:
            if not isinstance(tensor, Tensor) and not (name == "gate" and tensor is None):
                raise ValueError(f"{name}: is a {type(tensor).__name__}; tensors are needed")
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"q: {q.dtype} of shape {tuple(q.shape)}; floating point [B, T, H, d] is needed")
    batch, tokens, heads, width = q.shape
    for index, level in enumerate(levels):
        keys = level.shape[1] if level.dim() == 5 else "V"
        if level.shape != (batch, keys, 2, heads, width):
            raise ValueError(
                f"levels[{index}]: shape {tuple(level.shape)}; with q {tuple(q.shape)} "
                f"({batch}, {keys}, 2, {heads}, {width}) is needed"
            )
        if level.dtype != q.dtype or level.device != q.device:
            raise ValueError(f"levels[{index}]: {level.dtype} on {level.device}; q's {q.dtype} on {q.device} is needed")
    if gate is not None:
        if gate.shape != (batch, tokens, heads, len(levels)):
            raise ValueError(f"gate: shape {tuple(gate.shape)}; {(batch, tokens, heads, len(levels))} is needed")
        if not gate.is_floating_point() or gate.device != q.device:
            raise ValueError(f"gate: {gate.dtype} on {gate.device}; floating point on {q.device} is needed")
    if each_mask is not None and len(each_mask) != len(levels):
        raise ValueError(
            f"key_padding_mask: {len(each_mask)} given; one for all levels, or one for each of {len(levels)}"
        )
    for index, mask in enumerate(each_mask or ()):
        keys = levels[index].shape[1]
        if mask.shape != (batch, keys):
            raise ValueError(
                f"key_padding_mask: shape {tuple(mask.shape)}; {(batch, keys)} is needed for level {index}"
            )
        if mask.dtype != torch.bool or mask.device != q.device:
            raise ValueError(f"key_padding_mask: {mask.dtype} on {mask.device}; torch.bool on {q.device} is needed")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: {dropout_p}; a probability of at least 0 and below 1 is needed")
