"""Counts what processes ask of the server of a folder, from strace's output.

An operation is a call that names a path in the folder, or reads, writes, flushes, locks or closes an open file of it.
What a client answers from an open file alone is none: fstat, lseek, ioctl.

Source: strace(1), options -f, -y and -ttt.
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from unimo3.errors import ConfigError

_BY_PATH = (
    "open openat creat stat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat mkdir mkdirat rmdir "
    "unlink unlinkat rename renameat renameat2 link linkat symlink chmod fchmodat truncate utimensat statfs chdir"
).split()
_BY_FILE = (
    "read pread64 readv write pwrite64 writev close fsync fdatasync ftruncate getdents64 fstatfs fchmod flock"
).split()
_LOCK = "fcntl"
_CALL = re.compile(r"^(?:\d+ +)?(\d+\.\d+) (\w+)\((.*)$")
_NUMBER = re.compile(r"^\d+<([^>]*)>")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


class Operation(NamedTuple):
    """One operation on the folder.

    Attributes:
        at_s: seconds since 1970.
        path: in the folder.
    """

    at_s: float
    call: str
    path: str


def strace_command(output: Path) -> list[str]:
    """The words before a command whose calls are to be counted; the command stays a child of its caller.

    Raises:
        ConfigError: there is no strace.
    """
    strace = shutil.which("strace")
    if strace is None:
        raise ConfigError("strace: not found on this machine; install it (Debian: strace), or leave out this part")
    calls = ",".join(f"?{call}" for call in (*_BY_PATH, *_BY_FILE, _LOCK))
    return [strace, "-D", "-f", "-y", "-ttt", "-qq", "-s", "300", "-e", f"trace={calls}", "-o", str(output)]


def operations(output: Path, folder: Path) -> list[Operation]:
    """The operations on a folder and what is in it, in the order of strace's output."""
    with output.open(errors="replace") as lines:
        return list(_operations(lines, str(folder)))


def _operations(lines: Iterator[str], folder: str) -> Iterator[Operation]:
    for line in lines:
        if folder not in line or not (match := _CALL.match(line)):
            continue
        at_s, call, arguments = match.groups()
        of_file = _NUMBER.match(arguments)
        if of_file is not None and call in (*_BY_FILE, _LOCK):
            paths = [of_file[1]] if call != _LOCK or "F_SETLK" in arguments else []
        elif call in _BY_PATH:
            paths = [path for path in _STRING.findall(arguments) if path]
        else:
            paths = []
        if named := [path for path in paths if path == folder or path.startswith(f"{folder}/")]:
            yield Operation(float(at_s), call, named[0])


def per_minute(done: list[Operation], since_s: float, until_s: float) -> Counter[str]:
    """Operations a minute between two times, by call and name of the file, whose numbers are N."""
    within = [one for one in done if since_s <= one.at_s < until_s]
    counts = Counter(f"{one.call} {re.sub(r'[0-9]{5,}', 'N', Path(one.path).name)}" for one in within)
    minutes = (until_s - since_s) / 60
    return Counter({name: count / minutes for name, count in counts.items()})
