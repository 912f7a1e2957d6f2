"""Starts complete commands, ``python -m MODULE ARGUMENTS``, without importing torch and transformers each time.

A command is a process of its own: forked from the server of `tests.spawn`, it runs the module as ``__main__`` and ends
with the module's status. Ranks that `unimo3.launch` starts are forked from the launcher in the same way. What a fresh
interpreter does is shown by the jobs on Slurm, the benchmarks, `tests/test_launch.py` and `tests/test_startup.py`.
"""

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.spawn import ROOT, SERVER, redirect_output
from unimo3.launch import STOP_SIGNALS

_POPEN = subprocess.Popen


def start_command(
    module: str,
    arguments: Sequence[object],
    environment: Mapping[str, str],
    output: Path,
    max_file_bytes: int | None = None,
) -> BaseProcess:
    """Start a module as a command.

    Args:
        environment: replaces the test's own.
        output: file that standard output and error are appended to.
        max_file_bytes: where writing a file fails, as on a disk that is full.
    """
    sys.audit("tests.spawn.start", module)
    words = [str(argument) for argument in arguments]
    process = SERVER.Process(target=_command, args=(module, words, dict(environment), output, max_file_bytes))
    process.start()
    return process


def _command(
    module: str, arguments: list[str], environment: dict[str, str], output: Path, max_file_bytes: int | None
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(ROOT)
    redirect_output(output)
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    if module == "unimo3.launch":
        subprocess.Popen = _Rank  # type: ignore[misc,assignment]
    _run_as_main(module, arguments, environment)


def _run_as_main(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """What ``python -m`` does after the imports, up to the process's end."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
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


class _Rank:
    """What the launcher uses of a `subprocess.Popen`, for a module of Python that is forked from the launcher."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], process_group: int):
        python, dash_m, module, *arguments = command
        assert (python, dash_m) == (sys.executable, "-m")
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, process_group)
            subprocess.Popen = _POPEN  # type: ignore[misc]
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _run_as_main(module, arguments, env)

    def poll(self) -> int | None:
        """The exit status, or None while the rank runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the rank has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)
