"""Runs a function on several real gloo ranks, each a process of its own."""

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unimo3.errors import end_process
from unimo3.launch import start_ranks, wait_for_ranks

ROOT = Path(__file__).parents[1]


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 180) -> list[Any]:
    """Call ``function(*args)`` on `world_size` ranks and return what each returned.

    Args:
        function: at a module's top level; on each rank the process group is up when it is called.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder) / "call"
        call.write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
        with (Path(folder) / "output").open("w+") as output:
            ranks = start_ranks(
                world_size,
                [sys.executable, "-m", "tests.spawn", folder],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                status = wait_for_ranks(ranks, grace_s=5, timeout_s=timeout_s)
            finally:
                for rank in ranks:
                    rank.kill()
            output.seek(0)
            assert status == 0, f"a rank ended with status {status}:\n{output.read()[-6000:]}"
        return [pickle.loads((Path(folder) / f"result_{rank}").read_bytes()) for rank in range(world_size)]


def _main(folder: Path) -> None:
    from unimo3 import distributed

    module, name, args = pickle.loads((folder / "call").read_bytes())
    world = distributed.init()
    function = getattr(importlib.import_module(module), name)
    (folder / f"result_{world.rank}").write_bytes(pickle.dumps(function(*args)))
    distributed.barrier()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _main(Path(sys.argv[1]))
    end_process(0)
