"""NVIDIA apex is optional; another project of that name on the package index is not it.

Source: https://github.com/NVIDIA/apex; the index's ``apex`` is a Pyramid web toolkit.
"""

import importlib.util
import logging

log = logging.getLogger(__name__)


def wrong_apex_installed() -> bool:
    """Whether a package named apex is installed that is not NVIDIA's."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return False
    # NVIDIA's has always carried these; looking for them imports nothing.
    return not any(_has_submodule(spec, name) for name in ("normalization", "optimizers"))


def warn_of_wrong_apex() -> None:
    """Say so once if the wrong package is installed."""
    if wrong_apex_installed():
        log.warning(
            "the installed package 'apex' is not NVIDIA's (the package index has another project of that name); "
            "remove it with `pip uninstall apex` and build NVIDIA's from its source, or leave it out: it is optional"
        )


def _has_submodule(spec: importlib.machinery.ModuleSpec, name: str) -> bool:
    from pathlib import Path

    return any((Path(place) / name).is_dir() for place in spec.submodule_search_locations or ())
