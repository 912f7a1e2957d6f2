"""Starts N ranks of a program on this host: ``python -m unimo3.launch -n 2 pretrain.train --config ...``.

For one machine without Slurm. Stop signals go to every rank, the launcher waits while they save, and its exit status
is theirs, so a script sees the same status as under Slurm. (The deepspeed launcher answers SIGTERM with status 1,
torchrun ends the ranks 30 s after it.) When a rank fails, the others get a grace time to end by themselves, then are
killed.
"""

import argparse
import ctypes
import importlib.util
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from unimo3.errors import (
    EXIT_CONFIG,
    EXIT_DIVERGED,
    EXIT_STALLED,
    CommandParser,
    ConfigError,
    exit_with_status,
    report,
)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_LAUNCHER = "UNIMO3_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# Below those that the kernel gives to outgoing connections, by default from 32768 on.
_PORTS = (10000, 30000)


def free_port() -> int:
    """A TCP port nobody uses, for rank 0 to listen on once it has loaded its modules, seconds later."""
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("", port))
                return port


def start_ranks(num_ranks: int, command: list[str], **popen_arguments: Any) -> list[subprocess.Popen]:
    """Start `command` once a rank, with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set."""
    cores = len(os.sched_getaffinity(0))
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // num_ranks))),
        _LAUNCHER: str(os.getpid()),
    }
    # With torchrun's variables rank 0 would wait for a store that only torchrun starts.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    return [
        subprocess.Popen(
            command, env=inherited | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **popen_arguments
        )
        for rank in range(num_ranks)
    ]


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM to this rank when its launcher ends, however that ends; without one do nothing.

    A rank without its launcher would train on unseen. With SIGTERM it saves before it ends.
    """
    launcher = os.environ.pop(_LAUNCHER, None)  # this rank's own processes have another parent
    if launcher is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):  # it ended before
        os.kill(os.getpid(), signal.SIGTERM)


def wait_for_ranks(ranks: list[subprocess.Popen], grace_s: float, timeout_s: float = math.inf) -> int:
    """Wait for all; when one fails, or `timeout_s` is over, give the others `grace_s` to end, then kill them.

    Returns:
        The status of a rank that knows the reason, or else the first non-zero status, or 0.
    """
    first_failure = 0
    deadline: float | None = None
    ends = time.monotonic() + timeout_s
    # A list, not a generator: every rank is polled, also those after one that still runs.
    while any([rank.poll() is None for rank in ranks]):  # noqa: C419
        failed = [rank.returncode for rank in ranks if rank.returncode]
        if failed and deadline is None:
            first_failure = failed[0]
            deadline = time.monotonic() + grace_s
            for number, rank in enumerate(ranks):
                if rank.returncode is not None and rank.returncode < 0:
                    _report_signal(number, -rank.returncode)
        if deadline is None and time.monotonic() > ends:
            deadline = ends
        if deadline is not None and time.monotonic() > deadline:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
        time.sleep(0.1)
    statuses = [rank.returncode for rank in ranks]
    # A stopped rank that is woken to write its stack traces may crash before another one exits with status 71.
    decisive = next((status for status in (EXIT_CONFIG, EXIT_DIVERGED, EXIT_STALLED) if status in statuses), 0)
    return decisive or first_failure or next((status for status in statuses if status), 0)


def _report_signal(rank: int, number: int) -> None:
    # A program that ends for another reason reports it itself.
    hint = "; the kernel does that when memory runs out, see dmesg" if number == signal.SIGKILL else ""
    report(f"rank {rank} was ended by {signal.Signals(number).name}{hint}")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


@exit_with_status
def main() -> None:
    """Command line; see the module's text."""
    parser = CommandParser(prog="python -m unimo3.launch", description=__doc__)
    parser.add_argument("-n", "--num-ranks", type=int, required=True, help="processes to start")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds other ranks get to end after one failed")
    parser.add_argument("module", help="program, such as pretrain.train")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args()
    errors = []
    if args.num_ranks < 1:
        errors.append(f"--num-ranks {args.num_ranks}: at least 1 is needed")
    if not _is_module(args.module):
        errors.append(f"module {args.module}: Python finds no such program; pretrain.train and finetune.vqa are some")
    if errors:
        raise ConfigError(errors)
    ranks: list[subprocess.Popen] = []
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if not ranks and number != signal.SIGQUIT:
            early.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    for number in STOP_SIGNALS:
        signal.signal(number, forward)
    signal.signal(signal.SIGQUIT, forward)  # at which every rank writes its stack traces
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, lambda _, frame: forward(signal.SIGTERM, frame))
    # In a separate process group: a terminal's Ctrl-C goes to all of one, and the ranks would get it twice.
    command = [sys.executable, "-m", args.module, *args.arguments]
    ranks += start_ranks(args.num_ranks, command, process_group=0)
    for early_number in early:
        forward(early_number, None)
    status = wait_for_ranks(ranks, args.grace)
    # A rank ended by a signal has a negative status; shells write it as 128 + signal.
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
