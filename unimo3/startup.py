"""What a program does before its imports: text files in UTF-8, and garbage collection later.

Importing torch, timm, transformers and deepspeed creates millions of objects that live as long as the process. With
Python's default thresholds the collector walks all of them dozens of times meanwhile, which takes a third of the start.
"""

import atexit
import gc
import locale
import os
import sys
from pathlib import Path

_DEFAULT = gc.get_threshold()
# Allocations between collections of the youngest generation; the default is 700.
_WHILE_IMPORTING = 1_000_000


def use_utf8() -> None:
    """Start a program again in Python's UTF-8 mode if the locale's encoding is another: files and names are UTF-8.

    A program's package calls it. It does nothing where the package is imported by another program.
    """
    is_starting = sys.argv[:1] == ["-m"] or started_as("")  # -m: until Python has found the module
    if is_starting and not sys.flags.utf8_mode and locale.getpreferredencoding(False).upper() != "UTF-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def started_as(program: str) -> str:
    """The console script by which the user has started a program, else `program`, such as ``python -m MODULE``."""
    script = Path(*sys.argv[:1]).name
    return script if script.startswith("unimo3-") else program


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
