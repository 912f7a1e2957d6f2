"""``fork_client.py SOCKET -m MODULE ARGUMENTS`` stands for ``python -m MODULE ARGUMENTS`` in a job.

`tests.slurm.fork_server` gives the process. This one passes signals on, and ends as that process ends. It imports
nothing of the project, so it starts at once.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
LIMITS = (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)

address, _, module, *arguments = sys.argv[1:]
ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
request = {
    "module": module,
    "arguments": arguments,
    "environment": dict(os.environ),
    "folder": os.getcwd(),  # noqa: PTH109  (pathlib takes as long to import as all else here)
    "ignored": ignored,
    "limits": {limit: resource.getrlimit(limit) for limit in LIMITS},
}
server = socket.socket(socket.AF_UNIX)
server.connect(address)
content = json.dumps(request).encode()
socket.send_fds(server, [len(content).to_bytes(4, "big")], [0, 1, 2])
server.sendall(content)
process = int.from_bytes(server.recv(4) or sys.exit("the server has ended"), "big")


def pass_on(number, _):
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


for number in SIGNALS:
    if number not in ignored:
        signal.signal(number, pass_on)
status = int.from_bytes(server.recv(4) or sys.exit("the server has ended"), "big", signed=True)
if status < 0:
    if -status in SIGNALS:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
