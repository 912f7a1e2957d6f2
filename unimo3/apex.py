"""NVIDIA apex is optional; another project of that name on the package index is not it.

Source: https://github.com/NVIDIA/apex; the index's ``apex`` is a Pyramid web toolkit.
"""

import functools
import importlib
import importlib.util
import logging

import torch

log = logging.getLogger(__name__)

# Modules that apex's build makes on request only.
OPTIMIZER_EXTENSION, NORM_EXTENSION = "amp_C", "fused_layer_norm_cuda"


@functools.cache
def missing_apex(extension: str) -> str:
    """Why apex's kernels of an extension cannot be used here; empty if they can."""
    if not torch.cuda.is_available():
        return "NVIDIA's apex runs on GPUs, and there is none here"
    if importlib.util.find_spec("apex") is None or wrong_apex_installed():
        return "NVIDIA's apex is not installed"
    try:
        # torch's libraries first: the extension links to them.
        importlib.import_module(extension)
        importlib.import_module("apex.optimizers" if extension == OPTIMIZER_EXTENSION else "apex.normalization")
    except Exception as error:  # also of one that was built for another torch
        return f"NVIDIA's apex lacks its CUDA extension {extension} ({error}); build it with APEX_CUDA_EXT=1"
    return ""


def wrong_apex_installed() -> bool:
    """Whether a package named apex is installed that is not NVIDIA's."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return False
    # NVIDIA's has always carried these; looking for them imports nothing.
    return not any(_has_submodule(spec, name) for name in ("normalization", "optimizers"))


def warn_of_wrong_apex() -> None:
    """Log a warning if another package named apex is installed."""
    if wrong_apex_installed():
        log.warning(
            "the installed package 'apex' is not NVIDIA's (the package index has another project of that name); "
            "remove it with `pip uninstall apex` and build NVIDIA's from its source, or leave it out: it is optional"
        )


def _has_submodule(spec: importlib.machinery.ModuleSpec, name: str) -> bool:
    from pathlib import Path

    return any((Path(location) / name).is_dir() for location in spec.submodule_search_locations or ())
