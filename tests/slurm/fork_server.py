"""Gives a Slurm's tasks processes that have imported everything, in the place of fresh interpreters.

Importing torch, transformers and deepspeed takes most of the time of a job here, and jobs start dozens of ranks. The
server is forked from that of `tests.spawn`. For each `tests.slurm.fork_client`, a task of a job, the server forks a
process that runs the client's module with the client's environment, folder and streams. To Slurm and to the job's
script the client is the rank: the client receives the signals, and ends as the process ends. Whatever kills the client
kills the process.
"""

import json
import multiprocessing
import os
import resource
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.commands import run_as_main

STREAMS = (0, 1, 2)
NUM_BYTES = 4  # of a length, a process's number or a status


def serve(address: Path) -> None:
    """Answer clients at a Unix socket until this process is ended."""
    os.setsid()  # signals to the tests' group are not for ranks
    multiprocessing.current_process().daemon = False  # ranks may start readers
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)
        children: list[int] = []
        while True:
            connection, _ = listener.accept()
            children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
            child = os.fork()
            if child == 0:
                listener.close()
                try:
                    _answer(connection)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            children.append(child)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Start what a client asks for, and wait until it or the client ends."""
    head, streams, *_ = socket.recv_fds(connection, NUM_BYTES, len(STREAMS))
    with connection.makefile("rb") as file:
        request = json.loads(file.read(int.from_bytes(head, "big")))
    process = os.fork()
    if process == 0:
        connection.close()
        _become(request, streams)
    connection.sendall(process.to_bytes(NUM_BYTES, "big"))
    end = os.pidfd_open(process)
    ready, _, _ = select.select([end, connection], [], [])
    if end not in ready:
        os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if end in ready:
        connection.sendall(status.to_bytes(NUM_BYTES, "big", signed=True))


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """In the rank's process: all that comes before the module, which ends the process."""
    os.setsid()
    os.chdir(request["folder"])
    for stream, passed in zip(STREAMS, streams, strict=True):
        os.dup2(passed, stream)
        os.close(passed)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in STREAMS[1:])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    for limit, values in request["limits"].items():
        resource.setrlimit(int(limit), values)
    run_as_main(request["module"], request["arguments"], request["environment"])
