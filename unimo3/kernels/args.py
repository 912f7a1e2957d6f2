"""Which kernels a run uses, and their choice for this machine."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from unimo3.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelArgs:
    """Fused kernels instead of PyTorch's operations."""

    cross_layer_attention: Literal["auto", "triton", "reference"] = "auto"
    """triton: the fused kernels; reference: plain operations. auto: triton on a GPU, after a trial of it, and on CPUs
    the C++ kernel; the reference elsewhere."""
    layer_norm: Literal["auto", "apex", "torch"] = "auto"
    """apex: NVIDIA apex's FusedLayerNorm, in towers and fusion; torch: torch's. auto: apex where it is installed
    with its CUDA extensions and there is a GPU."""

    def attention_impl(self, width: int) -> str | None:
        """The `impl` of `cross_layer_attention` for heads of this width.

        Raises:
            ConfigError: the requested one does not support them, or not on this machine.
        """
        import torch

        from unimo3.kernels.cross_layer_attention import interprets_triton

        self.supported_on_gpu(width)
        if self.cross_layer_attention == "triton" and not (torch.cuda.is_available() or interprets_triton()):
            raise ConfigError("kernels.cross_layer_attention: 'triton': runs on GPUs, and there is none here; use auto")
        return None if self.cross_layer_attention == "auto" else self.cross_layer_attention

    def supported_on_gpu(self, width: int) -> bool:
        """Whether a GPU runs the fused kernels for heads of this width.

        Raises:
            ConfigError: they are asked for and do not support it.
        """
        from unimo3.kernels.cross_layer_attention import HEAD_WIDTHS

        if self.cross_layer_attention == "triton" and width not in HEAD_WIDTHS:
            raise ConfigError(
                f"kernels.cross_layer_attention: 'triton': supports head widths {', '.join(map(str, HEAD_WIDTHS))}, "
                f"and model.hidden_size / model.num_attention_heads is {width}; use auto, or other heads"
            )
        return self.cross_layer_attention != "reference" and width in HEAD_WIDTHS

    def choose_layer_norm(self, model: "nn.Module") -> None:
        """Give a model the layer norm that these settings name, and log it.

        Raises:
            ConfigError: the requested one is not available here.
        """
        from unimo3.apex import NORM_EXTENSION, missing_apex
        from unimo3.kernels.layer_norm import use_apex_layer_norm

        missing = missing_apex(NORM_EXTENSION)
        if self.layer_norm == "apex" and missing:
            raise ConfigError(f"kernels.layer_norm: 'apex': {missing}; use auto or torch")
        if self.layer_norm == "torch" or missing:
            log.info("layer norm: torch's (kernels.layer_norm: %s)", self.layer_norm)
        else:
            count = use_apex_layer_norm(model)
            log.info("layer norm: apex's, %d of them (kernels.layer_norm: %s)", count, self.layer_norm)
