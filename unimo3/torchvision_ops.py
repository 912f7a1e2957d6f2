"""Lets torchvision import beside a torch build it has no compiled operators for.

torchvision's wheel on PyPI is built against CUDA torch. Beside a CPU build of torch its extension cannot load, and
``import torchvision`` then fails at "operator torchvision::nms does not exist", taking timm and transformers' vision
models with it. Neither of these two box operators is used here; declaring their schemas is enough for the import.
Where the extension loads, nothing is declared.
"""

import contextlib
import importlib.util

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: torch.library.Library | None = None


def declare_missing_operators() -> bool:
    """Declare torchvision's box operators when its own extension cannot; return whether anything was declared."""
    global _declared
    spec = importlib.util.find_spec("torchvision")
    if _declared is not None or spec is None or spec.submodule_search_locations is None:
        return False
    for location in spec.submodule_search_locations:
        with contextlib.suppress(OSError):
            torch.ops.load_library(f"{location}/_C.so")
    missing = [name for name in _SCHEMAS if not _is_registered(name)]
    if not missing:
        return False
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        _declared.define(_SCHEMAS[name])
    return True


def _is_registered(name: str) -> bool:
    return torch._C._dispatch_has_kernel(f"torchvision::{name}")
