"""Operations of the model that have fused kernels."""

from unimo3.kernels.cross_layer_attention import cross_layer_attention

__all__ = ["cross_layer_attention"]
