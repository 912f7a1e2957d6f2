"""Cross-layer attention: the one operation in which a token reads several levels of the other modality."""

from collections.abc import Sequence

from torch import Tensor

from unimo3.kernels.cross_layer_attention import native
from unimo3.kernels.cross_layer_attention.reference import cross_layer_attention_reference

__all__ = ["cross_layer_attention", "cross_layer_attention_reference"]

IMPLEMENTATIONS = ("native", "reference")


def cross_layer_attention(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    gate: Tensor | None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """Attend to every level and mix the results by the gate; see `cross_layer_attention_reference` for shapes.

    Args:
        impl: ``native``, the C++ kernel for float32 on CPUs, or ``reference``; by default the first that serves `q`.

    Raises:
        ValueError: the shapes do not fit together, or `impl` does not serve these tensors.
    """
    if len(k) != len(v) or not k:
        raise ValueError(f"k and v: {len(k)} and {len(v)} levels given; one key and one value tensor a level is needed")
    batch, heads, tokens, width = q.shape
    for name, levels in (("k", k), ("v", v)):
        for level, tensor in enumerate(levels):
            if tensor.shape != (batch, heads, k[0].shape[2], width):
                raise ValueError(
                    f"{name}[{level}]: shape {tuple(tensor.shape)}; with q {tuple(q.shape)} and the other levels "
                    f"{(batch, heads, k[0].shape[2], width)} is needed"
                )
            if tensor.dtype != q.dtype or tensor.device != q.device:
                raise ValueError(
                    f"{name}[{level}]: {tensor.dtype} on {tensor.device}; q's {q.dtype} on {q.device} is needed"
                )
    if gate is not None and gate.shape != (batch, tokens, heads, len(k)):
        raise ValueError(f"gate: shape {tuple(gate.shape)}; {(batch, tokens, heads, len(k))} is needed")
    if key_padding_mask is not None and key_padding_mask.shape != (batch, k[0].shape[2]):
        raise ValueError(f"key_padding_mask: shape {tuple(key_padding_mask.shape)}; {(batch, k[0].shape[2])} is needed")
    if impl not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"impl: '{impl}'; one of {', '.join(IMPLEMENTATIONS)} is served")
    if impl != "reference" and native.serves(q):
        return native.attend(q, k, v, gate, key_padding_mask, dropout_p)
    if impl == "native":
        raise ValueError(
            f"impl: 'native' with q of {q.dtype} on {q.device}, head width {width}; float32 on a CPU, a multiple of "
            f"{native.WIDTH_MULTIPLE} and a C++ compiler are needed"
        )
    return cross_layer_attention_reference(q, k, v, gate, key_padding_mask, dropout_p)
