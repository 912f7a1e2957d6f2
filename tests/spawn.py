"""Runs a function on several real gloo ranks, each a process of its own.

Ranks are forked from a server that has imported everything once (`tests.preload`), so that a rank starts in a fraction
of a second. `tests.commands` starts complete commands in the same way.
"""

import importlib
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.waiting import PATIENCE_S, hang, text_of

ROOT = Path(__file__).parents[1]
# The others end by themselves after one rank failed, with messages of their own.
_GRACE_S = 2.0
# Characters of each rank's output in the message of a failure.
_NUM_CHARACTERS = 3000
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preload"])

KILLED = "killed"


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` on `world_size` ranks and return what each returned.

    Args:
        function: at a module's top level; on each rank the process group is up when it is called.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = _start(Path(folder), world_size, function, args, has_group=True)
        _wait(ranks, Path(folder))
        statuses = [rank.exitcode for rank in ranks]
        assert statuses == [0] * world_size, f"ranks ended with {statuses}:\n{_output(Path(folder))}"
        return [_result(Path(folder), rank) for rank in range(world_size)]


def run_ranks_to_any_end(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """As `run_ranks`, where ranks may fail: for each what it returned, `KILLED`, or ``"failed: ..."``.

    When a rank is killed, the others are killed as well, as a launcher does.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = _start(Path(folder), world_size, function, args, has_group=True)
        _wait(ranks, Path(folder), grace_of_killed_s=0.0)
        return [
            _result(Path(folder), number) if _result_path(Path(folder), number).exists() else KILLED
            for number in range(world_size)
        ]


def run_alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function(*args)`` in a process of its own that belongs to no process group; what it returned."""
    with tempfile.TemporaryDirectory() as folder:
        (process,) = _start(Path(folder), 1, function, args, has_group=False)
        _wait([process], Path(folder))
        assert process.exitcode == 0, f"the process ended with {process.exitcode}:\n{_output(Path(folder))}"
        return _result(Path(folder), 0)


def start_process(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """A process that calls ``function(*args)`` with this one's environment, forked from the server as a rank is.

    A fork of this process itself would copy locks that other threads hold, such as OpenSSL's while a test's server
    answers, and would wait for them forever.
    """
    sys.audit("tests.spawn.start", function.__qualname__)
    process = SERVER.Process(target=_call, args=(dict(os.environ), function, args), daemon=True)
    process.start()
    return process


def _call(environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    multiprocessing.current_process().daemon = False  # which may start readers; it is killed as one all the same
    multiprocessing.set_start_method(None, force=True)  # its readers are started as in a command
    os.environ.clear()
    os.environ.update(environment)
    function(*args)


def _start(
    folder: Path, world_size: int, function: Callable[..., Any], args: tuple[Any, ...], has_group: bool
) -> list[BaseProcess]:
    call = pickle.dumps((function.__module__, function.__qualname__, args))
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    if has_group:
        environment |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    sys.audit("tests.spawn.start", function.__qualname__)
    ranks = []
    for number in range(world_size):
        ranked = {"RANK": str(number), "LOCAL_RANK": str(number)} if has_group else {}
        ranks.append(SERVER.Process(target=_run, args=(folder, number, environment | ranked, call, has_group)))
        ranks[-1].start()
    return ranks


def _wait(ranks: list[BaseProcess], folder: Path, grace_of_killed_s: float = _GRACE_S) -> None:
    """Until all have ended. After the first failure the others get a grace period, then they are killed.

    Args:
        grace_of_killed_s: the grace period if the first failure is a kill.
    """
    hangs_at = deadline = time.monotonic() + PATIENCE_S
    try:
        while running := [rank for rank in ranks if rank.exitcode is None]:
            failed = [rank.exitcode for rank in ranks if rank.exitcode]
            if failed:
                grace_s = grace_of_killed_s if min(failed) < 0 else _GRACE_S
                deadline = min(deadline, time.monotonic() + grace_s)
            if not wait([rank.sentinel for rank in running], max(0.0, deadline - time.monotonic())):
                assert time.monotonic() < hangs_at, hang("ranks", _output(folder))
                for rank in running:
                    rank.kill()
                    rank.join()
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _run(folder: Path, number: int, environment: dict[str, str], call: bytes, has_group: bool) -> None:
    """What a rank does after the fork."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    redirect_output(folder / f"output_{number}")
    import torch

    from unimo3 import distributed
    from unimo3.errors import end_process

    torch.set_num_threads(1)
    status = 0
    try:
        if has_group:
            distributed.init()
        module, name, args = pickle.loads(call)
        result = getattr(importlib.import_module(module), name)(*args)
    except BaseException:
        traceback.print_exc()
        result, status = f"failed: {traceback.format_exc(limit=-1)}", 1
    partial = folder / f"partial_{number}"
    partial.write_bytes(pickle.dumps(result))
    partial.rename(_result_path(folder, number))
    if has_group and status == 0:
        distributed.barrier()
    end_process(status)


def redirect_output(path: Path) -> None:
    """Append standard output and error to a file, in a process that was forked."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))


def _result_path(folder: Path, number: int) -> Path:
    return folder / f"result_{number}"


def _result(folder: Path, number: int) -> Any:
    return pickle.loads(_result_path(folder, number).read_bytes())


def _output(folder: Path) -> str:
    """The end of what each rank wrote. One rank's error makes the others lose their connection to it."""
    paths = sorted(folder.glob("output_*"), key=lambda path: "Connection" in text_of(path)())
    return "\n".join(f"--- {path.name}\n{text_of(path)()[-_NUM_CHARACTERS:]}" for path in paths)


# The processes that run tests.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# Below those that the kernel hands out, and for each of these processes its own.
_first = random.SystemRandom().randrange(300)  # of tests that run next to these ones
_ports = itertools.cycle(30000 + 300 * WORKER + (_first + number) % 300 for number in range(300))


def _free_port() -> int:
    for port in _ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable")
