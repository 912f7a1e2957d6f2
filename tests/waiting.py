"""Waiting for events: every wait of the tests ends with its event, and only a hang ends it otherwise.

TEST_PATIENCE is the number of seconds after which a wait is taken for a hang. It is far above what any event needs on a
slow and busy machine, so no test passes or fails by it otherwise.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import psutil

PATIENCE_S = float(os.environ.get("TEST_PATIENCE", "1800"))
_POLL_S = 0.02
_NUM_CHARACTERS = 4000

Answer = TypeVar("Answer")


def wait_for(
    condition: Callable[[], Answer], what: str, output: Callable[[], str] = str, poll_s: float = _POLL_S
) -> Answer:
    """Poll until `condition` gives something true, and return it.

    Args:
        what: the event, for the message of a hang.
        output: gives the last output of the programs that the event depends on.
        poll_s: seconds between looks.

    Raises:
        AssertionError: the wait hangs; it names the event, the states of all processes below this one and the output.
    """
    ends = time.monotonic() + PATIENCE_S
    while not (answer := condition()):
        if time.monotonic() > ends:
            raise AssertionError(hang(what, output()))
        time.sleep(poll_s)  # between two looks at the condition
    return answer


def wait_for_end(process: BaseProcess, what: str, output: Callable[[], str] = str) -> None:
    """Wait until a process ends. A process that hangs is killed."""
    process.join(PATIENCE_S)
    if process.exitcode is None:
        text = hang(f"the end of {what}", output())
        process.kill()
        process.join()
        raise AssertionError(text)


def output_of(process: subprocess.Popen, what: str) -> tuple[str, str]:
    """All that a process still writes to its pipes until it ends: standard output and standard error."""
    try:
        output, errors = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        text = hang(f"the end of {what}", "")
        process.kill()
        output, errors = process.communicate()
        raise AssertionError(f"{text}\n{output}\n{errors}") from None
    return output, errors


def hang(what: str, output: str) -> str:
    """The message of a wait that hangs."""
    lines = [f"waited {PATIENCE_S:.0f} s (TEST_PATIENCE) for {what}", *process_states(psutil.Process().children(True))]
    return "\n".join([*lines, output[-_NUM_CHARACTERS:]])


def process_states(processes: Iterable[psutil.Process]) -> list[str]:
    """One line a process: number, state and command."""
    lines = []
    for process in processes:
        try:
            lines.append(f"  {process.pid} {process.status()} {' '.join(process.cmdline())[:150]}")
        except psutil.Error:
            continue  # it has ended meanwhile
    return lines


def text_of(path: Path) -> Callable[[], str]:
    """Reads a file that may not be there yet, for `wait_for`'s output."""
    return lambda: path.read_text(errors="replace") if path.exists() else ""
