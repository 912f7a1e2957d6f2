"""Garbage collection while a program starts.

Importing torch, timm, transformers and deepspeed creates millions of objects that live as long as the process. With
Python's default thresholds the collector walks all of them dozens of times meanwhile, which takes a third of the start.
"""

import atexit
import gc

_DEFAULT = gc.get_threshold()
# Allocations between collections of the youngest generation; the default is 700.
_WHILE_IMPORTING = 1_000_000


def postpone_collections() -> None:
    """Collect seldom until `resume_collections`; a program's package calls it before anything large is imported."""
    gc.set_threshold(_WHILE_IMPORTING, *_DEFAULT[1:])


def resume_collections() -> None:
    """Collect as usual, but never walk what has been imported again; without `postpone_collections` a no-op."""
    if gc.get_threshold() != _DEFAULT:
        gc.freeze()
        # Frozen objects cannot be freed when the interpreter ends, and triton's bindings would report each of them.
        atexit.register(gc.unfreeze)
        gc.set_threshold(*_DEFAULT)
