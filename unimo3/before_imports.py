"""What torchvision, deepspeed and transformers need before they are imported, done when a program first imports them.

torchvision: its wheel on PyPI is built against CUDA torch. Next to a CPU build of torch its extension cannot load, and
``import torchvision`` then fails at "operator torchvision::nms does not exist", taking timm and transformers' vision
models with it. Neither of these two box operators is used here; declaring their schemas is enough for the import.
Where the extension loads, nothing is declared.

deepspeed: without DS_ACCELERATOR it probes for other accelerators, so a machine without a GPU names its CPU.

transformers: each process reads some 1,700 of its files to list the classes in them. Its cache has room for 128 of its
550 folders, so it reads all of them twice: half a second of a rank's start, and 1,700 more opens on a shared disk.

timm, deepspeed and tensorboard: each imports a package where it is installed, for what is not used here: wandb, mlflow,
and boto3 for event files in S3. They take 2 s of a rank's start, and begin threads of their own.

The first two need torch, which takes seconds to import. Programs that use neither library, such as ``slurm.status``,
never import torch.
"""

import contextlib
import functools
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: Any = None  # the torch.library.Library that keeps the declarations alive


class _Before(importlib.abc.MetaPathFinder):
    """Finds nothing itself; calls a function when a package is about to be imported."""

    def __init__(self, package: str, prepare: Callable[[], object]):
        self.package, self.prepare = package, prepare

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == self.package:
            sys.meta_path.remove(self)
            self.prepare()


class _Without(importlib.abc.MetaPathFinder):
    """While a module is being imported, a package that it would use only if installed is not found."""

    def __init__(self, package: str, module: str):
        self.package, self.module = package, module

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        spec = getattr(sys.modules.get(self.module), "__spec__", None)
        if name == self.package and getattr(spec, "_initializing", False):
            raise ModuleNotFoundError(f"{self.package} is not needed by {self.module}", name=name)


def prepare_imports() -> None:
    """Have the libraries prepared for when they are first imported."""
    for package, module in (
        ("wandb", "timm.utils.summary"),
        ("mlflow", "deepspeed.autotuning.autotuner"),
        ("botocore", "tensorboard.compat.tensorflow_stub.io.gfile"),
    ):
        sys.meta_path.insert(0, _Without(package, module))
    for package, prepare in (
        ("torchvision", declare_missing_operators),
        ("deepspeed", choose_accelerator),
        # The first module after the one with the cache.
        ("transformers.utils.hub", remember_all_folders),
    ):
        if package not in sys.modules:
            sys.meta_path.insert(0, _Before(package, prepare))


def choose_accelerator() -> None:
    """Set DS_ACCELERATOR to ``cpu`` where there is no GPU, unless it is set."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def remember_all_folders() -> None:
    """Remove the limit of transformers' cache of the classes in each of its folders."""
    module = sys.modules.get("transformers.utils.import_utils")
    listing: Any = getattr(module, "create_import_structure_from_path", None)
    if module is not None and hasattr(listing, "cache_parameters"):
        vars(module)[listing.__name__] = functools.cache(listing.__wrapped__)


def declare_missing_operators() -> bool:
    """Declare torchvision's box operators when its extension cannot; return whether anything was declared."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    if _library is not None or spec is None or spec.submodule_search_locations is None:
        return False
    import torch

    for location in spec.submodule_search_locations:
        for extension in Path(location).glob("_C*.so"):  # _C_stable.so from torchvision 0.29 on
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(extension))
    missing = [name for name in _SCHEMAS if not torch._C._dispatch_has_kernel(f"torchvision::{name}")]
    if not missing:
        return False
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        _library.define(_SCHEMAS[name])
    return True
