"""UNIMO-3: vision-language pretraining with cross-layer interaction (arXiv 2305.13697)."""

from unimo3 import before_imports as _before_imports

_before_imports.prepare_imports()

__version__ = "0.1.0"
