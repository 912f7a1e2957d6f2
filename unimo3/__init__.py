"""UNIMO-3: vision-language pretraining with cross-layer interaction (arXiv 2305.13697)."""

from unimo3 import torchvision_ops as _torchvision_ops

_torchvision_ops.declare_before_torchvision()

__version__ = "0.1.0"
