"""Errors a user can fix, and the exit status each one gives a process.

Every message names the field or file, the value found and what to do. A program's ``main`` runs under
`exit_with_status`, so a Slurm script can decide from the status alone whether to requeue.

Source: sysexits.h for the numbers (EX_SOFTWARE 70, EX_OSERR 71, EX_TEMPFAIL 75, EX_CONFIG 78).
"""

import argparse
import atexit
import errno
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from unimo3 import __version__
from unimo3.limits import address_errors
from unimo3.startup import resume_collections, started_as

EXIT_DONE = 0
EXIT_DIVERGED = 70
EXIT_STALLED = 71
EXIT_REQUEUE = 75
EXIT_CONFIG = 78
_EXIT_PIPE = 128 + signal.SIGPIPE  # as of programs that the signal ends


# User and password of a URL, which may have slashes behind its colon; one slash: of a URL that was taken for a path.
_LOGIN = re.compile(r"(?<=[a-z0-9]:/)(/?)(?:[^/\s'\":]*:(?!\d+/)[^\s'\"]*|[^/\s'\":]*)@")
_QUERY = re.compile(r"(://[^\s'\"?#]*)[?#][^\s'\"]*[^\s'\":;,.)]")
_READER_DIED = re.compile(r"DataLoader worker \(pid.*?(killed by signal: \w+|exited unexpectedly)")


# Errors of a server that fails over or of a stale mount: neither damage of a file nor a wrong setting.
NO_ANSWER = (
    errno.ESTALE,
    errno.EIO,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EREMOTEIO,
)
CHECK_MOUNT = "check the server or the mount, then start the same command again"
# Permissions, and limits of a disk or of the process, that people have to change.
_CHECK_OWNER = "check the owner and the permissions of the file and its folder (umask)"
_REMEDIES = {
    errno.ENOSPC: "free space, then start the same command again",
    errno.EDQUOT: "free space or have the quota raised, then start the same command again",
    errno.EROFS: "mount it writable, or choose another folder",
    errno.EACCES: _CHECK_OWNER,
    errno.EPERM: _CHECK_OWNER,
    errno.EFBIG: "raise ulimit -f",
    errno.EMFILE: "raise ulimit -n, or lower data.num_workers and data.prefetch",
    errno.EAGAIN: "raise ulimit -u, or lower data.num_workers",
}
# Parts of the messages of a RuntimeError of Python's or torch's. A network may be unavailable for a while, too, and a
# driver may not permit an operation.
_TEXTS = {os.strerror(number): number for number in _REMEDIES if number not in (errno.EAGAIN, errno.EPERM)}
_TEXTS |= {"can't start new thread": errno.EAGAIN, "received 0 items of ancdata": errno.EMFILE}


class Unimo3Error(ValueError):
    """An error with a message meant for the user; a scheduler decides by its `exit_status`."""

    exit_status = EXIT_CONFIG


class ConfigError(Unimo3Error):
    """One or more settings cannot be used.

    Args:
        errors: one line per error, each naming the field, the value and the fix.
    """

    def __init__(self, errors: str | Sequence[str]):
        self.errors = [errors] if isinstance(errors, str) else list(errors)
        noun = "error" if len(self.errors) == 1 else "errors"
        lines = "\n".join(f"  - {problem}" for problem in self.errors)
        super().__init__(f"Invalid configuration ({len(self.errors)} {noun}):\n{lines}")


class DataError(Unimo3Error):
    """A data file is missing, unreadable or not in its format."""


class CheckpointError(Unimo3Error):
    """A checkpoint or exported folder is missing, incomplete or of another model."""


class UnreachableError(DataError, CheckpointError):
    """A server or a mount gave no answer; it may at the next start."""

    exit_status = 1


class DivergedError(Unimo3Error):
    """Training produced non-finite losses beyond the budget; a restart would do the same."""

    exit_status = EXIT_DIVERGED


class Interrupted(Exception):
    """The run was asked to stop, has saved a checkpoint, and wants to be started again."""

    exit_status = EXIT_REQUEUE


def no_answer(error: BaseException | None) -> OSError | UnreachableError | None:
    """The error of storage that gave no answer, from which another one came; None: it came from none."""
    while error is not None:
        if isinstance(error, UnreachableError) or (isinstance(error, OSError) and error.errno in NO_ANSWER):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def explained(error: Unimo3Error | OSError | RuntimeError) -> Unimo3Error | None:
    """The error to end a program with, where another one came from storage or from a limit; None: it has no message."""
    if no_answer(error) and not isinstance(error, UnreachableError):
        return UnreachableError(str(error) if isinstance(error, Unimo3Error) else f"{error}; {CHECK_MOUNT}")
    if isinstance(error, Unimo3Error):
        return error
    number = next((number for part, number in _TEXTS.items() if part in str(error)), None)
    number = error.errno if isinstance(error, OSError) else number
    if number not in _REMEDIES:
        return None
    # An error in a reader process: the line after its traceback.
    return ConfigError(f"{str(error).strip().splitlines()[-1]}; {_REMEDIES[number]}")


def record_end(status: int, message: str = "") -> None:
    """Write this rank's status, and the reason on the next line, to the file that the job script reads.

    srun returns the highest status of all, and a rank that is ended because another failed has a higher one.
    """
    if folder := os.environ.get("UNIMO3_STATUS_DIR"):
        with suppress(OSError):
            path = Path(folder, f"rank_{os.environ.get('RANK', '0')}")
            path.write_text(f"{status}\n{message}\n", encoding="utf-8", errors="backslashreplace")


def end_process(status: int, message: str = "", is_recorded: bool = True) -> NoReturn:
    """End with `status`, whatever a process group's threads do.

    gloo's threads still run when the interpreter shuts down, and abort about one process in ten (SIGABRT,
    status 134) after all its work is done. A process that joined a group therefore ends without that: exit functions
    run, output is flushed, and nothing else.

    Args:
        message: why, for the job script.
        is_recorded: whether the job script learns that the rank ended so by itself and not for another's sake.
    """
    if is_recorded:
        record_end(status, message)
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        atexit._run_exitfuncs()
        os._exit(_flush(status))
    sys.exit(_flush(status))


def _flush(status: int) -> int:
    """Flush the output and return the status to end with: what cannot be written changes only that of success."""
    for number, stream in ((2, sys.stderr), (1, sys.stdout)):
        try:
            stream.flush()
        except OSError as error:
            # The interpreter flushes again at its end; what is lost must not change the status then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            if number == 1 and status == EXIT_DONE:
                status = _EXIT_PIPE if isinstance(error, BrokenPipeError) else 1
                if status == 1:
                    report(f"standard output cannot be written ({error.strerror})")
    return status


def without_secrets(text: str) -> str:
    """A message without users, passwords, queries and fragments of the URLs in it."""
    return _LOGIN.sub(r"\1...", _QUERY.sub(r"\1...", text))


def _end_by(error: Unimo3Error | Interrupted, is_reported: bool) -> NoReturn:
    # The reason of a job that is held is in its comment, which all users of a cluster can read.
    message = without_secrets(f"{type(error).__name__}: {error}")
    if is_reported:
        report(message)
    end_process(error.exit_status, message)


def report(text: str) -> None:
    """Print a line to standard error, if that can be written."""
    with suppress(OSError):  # the exit status has the rest
        print(text, file=sys.stderr, flush=True)


class CommandParser(argparse.ArgumentParser):
    """Command lines whose mistakes end like any other bad setting: status 78 under `exit_with_status`."""

    def __init__(self, *args: Any, **kwargs: Any):
        if kwargs.get("prog", "").startswith("python -m "):  # of a subcommand it begins as that of its parent
            kwargs["prog"] = started_as(kwargs["prog"])
        # A misspelt option must not count as the abbreviation of another.
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})
        if self.add_help:
            self.add_argument("--version", action="version", version=f"unimo3 {__version__}")

    def error(self, message: str) -> NoReturn:
        """Print the usage, then raise the error."""
        self.print_usage(sys.stderr)
        raise ConfigError(message)


def exit_with_status(main: Callable[..., int | None]) -> Callable[..., None]:
    """Wrap a program's main so that its errors end the process with the documented status and one message."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        resume_collections()
        if os.environ.get("WORLD_SIZE", "1") == "1":
            # A process alone is rank 0, whatever another program's launcher has left in the environment.
            for name in ("RANK", "LOCAL_RANK"):
                os.environ.pop(name, None)
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # of its host; later it is the index of a GPU
        # A stream that was closed before the start is None: nothing can be printed to it.
        sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
        sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A name that is no UTF-8, or half a surrogate pair, is shown by its number.
                stream.reconfigure(errors="backslashreplace")
        try:
            status = main(*args, **kwargs)
        except Interrupted as error:
            _end_by(error, is_first)
        except (MemoryError, ImportError):
            if not (problems := address_errors()):
                raise
            _end_by(ConfigError(problems), is_first)
        except (Unimo3Error, OSError, RuntimeError) as error:
            # torch raises it wherever the main thread is when a reader process dies.
            if died := _READER_DIED.search(str(error)):
                report(
                    f"ReaderDied: a reader process ended before its time ({died[0]}); the system log has the reason, "
                    "most often memory ran out, or /dev/shm (Bus error): lower data.num_workers or data.prefetch, and "
                    "start the same command again"
                )
                end_process(1)
            if isinstance(error, OSError) and error.filename is None:
                try:
                    sys.stdout.flush()
                except OSError:  # a print failed: the disk is full, or the reader has ended, as ``head`` does
                    end_process(EXIT_DONE, is_recorded=False)  # with the status of lost output, see `_flush`
            if (reason := explained(error)) is None:
                raise
            # An error that all ranks of a host have is reported once a host.
            _end_by(reason, is_first or not isinstance(error, ConfigError))
        end_process(status or EXIT_DONE)

    return wrapped
