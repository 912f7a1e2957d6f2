"""Layer norm by NVIDIA apex's fused kernel, instead of torch's.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias          over the last dimensions, sums in float32

Source: apex.normalization.fused_layer_norm; arXiv 1607.06450.
"""

from timm import layers
from torch import Tensor, nn


class ApexLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that runs apex's kernel; parameters and their names are the same."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., *normalized_shape] -> the same shape."""
        # apex's launch fails where there is nothing to norm.
        if not input.is_cuda or not input.numel():
            return super().forward(input)
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine

        out: Tensor = fused_layer_norm_affine(input, self.weight, self.bias, self.normalized_shape, self.eps)
        return out


def use_apex_layer_norm(model: nn.Module) -> int:
    """Let every layer norm of a model run apex's kernel, and return how many there are.

    Args:
        model: of torch's layers or timm's; a norm without weight or bias, which the kernel does not support, is not
            replaced.
    """
    # These classes alone: a further subclass may norm another dimension.
    supported = (nn.LayerNorm, layers.LayerNorm)
    norms = [
        module
        for module in model.modules()
        if type(module) in supported and module.weight is not None and module.bias is not None
    ]
    for module in norms:
        # The class alone changes: hooks, parameters and what ZeRO-3 knows of them stay.
        module.__class__ = ApexLayerNorm
    return len(norms)
