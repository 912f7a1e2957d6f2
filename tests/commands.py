"""Starts complete commands, ``python -m MODULE ARGUMENTS``, without importing torch and transformers each time.

A command is a process of its own: forked from the server of `tests.spawn`, it runs the module as ``__main__`` and ends
with the module's status. Ranks that `unimo3.launch` starts, and programs that a benchmark or an example starts, are
forked from it in the same way. What a fresh interpreter does is shown by the chain of jobs in
`tests/slurm/test_submission.py`, by `tests/test_launch.py` and by `tests/test_startup.py`.
"""

import atexit
import inspect
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import traceback
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.spawn import ROOT, SERVER, redirect_output
from unimo3.launch import STOP_SIGNALS

_POPEN = subprocess.Popen
_EXECUTE = inspect.signature(_POPEN._execute_child)  # type: ignore[attr-defined]


def start_command(
    module: str,
    arguments: Sequence[object],
    environment: Mapping[str, str],
    output: Path,
    limits: Mapping[int, int] | None = None,
    folder: Path = ROOT,
) -> BaseProcess:
    """Start a module as a command.

    Args:
        environment: replaces the test's own.
        output: file that standard output and error are appended to.
        limits: of the process, by their numbers in `resource`.
        folder: to start in.
    """
    sys.audit("tests.spawn.start", module)
    words = [str(argument) for argument in arguments]
    process = SERVER.Process(
        target=_command, args=(module, words, dict(environment), output, dict(limits or {}), folder)
    )
    process.start()
    return process


def _command(
    module: str, arguments: list[str], environment: dict[str, str], output: Path, limits: dict[int, int], folder: Path
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    redirect_output(output)
    for number, limit in limits.items():
        resource.setrlimit(number, (limit, limit))
    run_as_main(module, arguments, environment)


def run_as_main(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """What ``python -m`` does after the imports, up to the process's end."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    starts_modules = module == "unimo3.launch" or module.startswith(("benchmarks.", "examples."))
    subprocess.Popen = _ForkedModule if starts_modules else _POPEN  # type: ignore[misc]
    # The default, in place of the one by which the server started this process.
    multiprocessing.set_start_method(None, force=True)
    sys.modules.pop(module, None)
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _ForkedModule(subprocess.Popen):
    """Forks ``python -m MODULE ...`` from this process; starts any other command as usual."""

    def _execute_child(self, args: Any, *others: Any) -> None:
        if isinstance(args, str) or list(args[:2]) != [sys.executable, "-m"]:
            _POPEN._execute_child(self, args, *others)  # type: ignore[attr-defined]
            return
        started = _EXECUTE.bind(self, args, *others).arguments
        environment = os.environ if started["env"] is None else started["env"]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._become(args, started, dict(environment))
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(started[end] for end in ends))  # type: ignore[attr-defined]

    @staticmethod
    def _become(args: Sequence[Any], started: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """In the child: all that comes before the module, which ends the process."""
        if started["start_new_session"]:
            os.setsid()
        if started["process_group"] >= 0:
            os.setpgid(0, started["process_group"])
        os.chdir(started["cwd"] or os.curdir)
        for number, end in enumerate((started["p2cread"], started["c2pwrite"], started["errwrite"])):
            if end != -1:
                os.dup2(end, number)
        for end in (started["p2cwrite"], started["c2pread"], started["errread"]):
            if end != -1:
                os.close(end)
        # The parent's may be of a file, and these of a pipe.
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
            finalizer.atexit = False  # such as the parent's temporary folders
        run_as_main(str(args[2]), [str(word) for word in args[3:]], environment)
