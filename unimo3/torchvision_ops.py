"""Lets torchvision import next to a torch build it has no compiled operators for.

torchvision's wheel on PyPI is built against CUDA torch. Next to a CPU build of torch its extension cannot load, and
``import torchvision`` then fails at "operator torchvision::nms does not exist", taking timm and transformers' vision
models with it. Neither of these two box operators is used here; declaring their schemas is enough for the import.
Where the extension loads, nothing is declared.

The declaration needs torch, which takes seconds to import. It is therefore made when torchvision is first looked for,
and programs that read no images, such as ``slurm.status``, never import torch.
"""

import contextlib
import importlib.abc
import importlib.util
import sys
from typing import Any

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: Any = None  # the torch.library.Library that keeps the declarations alive


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing itself; declares the operators when somebody looks for torchvision."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_missing_operators()


def declare_before_torchvision() -> None:
    """Have the missing operators declared when torchvision is first imported."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _BeforeTorchvision())


def declare_missing_operators() -> bool:
    """Declare torchvision's box operators when its own extension cannot; return whether anything was declared."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    if _library is not None or spec is None or spec.submodule_search_locations is None:
        return False
    import torch

    for location in spec.submodule_search_locations:
        with contextlib.suppress(OSError):
            torch.ops.load_library(f"{location}/_C.so")
    missing = [name for name in _SCHEMAS if not torch._C._dispatch_has_kernel(f"torchvision::{name}")]
    if not missing:
        return False
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        _library.define(_SCHEMAS[name])
    return True
