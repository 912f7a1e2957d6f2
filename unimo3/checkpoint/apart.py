"""DeepSpeed's saves and loads without their meetings of all ranks: one that fails leaves nobody waiting.

Between the barriers of its save, and before the gathering of persistent parameters that ends a save and a load, a rank
may fail; the others would wait there for ever. In here every rank does its own part alone. All meet afterwards, as the
caller sees to, and only then are persistent parameters gathered.

Source: DeepSpeed 0.19, runtime/engine.py (save_checkpoint, load_checkpoint), runtime/zero/stage3.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed import comm

_EPILOGUE = "checkpoint_event_epilogue"


@contextmanager
def apart(optimizer: Any) -> Iterator[None]:
    """While in it, barriers are passed through and persistent parameters stay in parts."""
    barrier = comm.barrier
    comm.barrier = lambda *_, **__: None
    if hasattr(optimizer, _EPILOGUE):
        setattr(optimizer, _EPILOGUE, lambda: None)
    try:
        yield
    finally:
        comm.barrier = barrier
        if _EPILOGUE in vars(optimizer):
            delattr(optimizer, _EPILOGUE)


def gather_persistent(optimizer: Any) -> None:
    """Make persistent parameters whole again; every rank calls it, whatever became of the save or load."""
    if hasattr(optimizer, _EPILOGUE):
        getattr(optimizer, _EPILOGUE)()
