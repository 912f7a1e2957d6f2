"""Jobs spread over MPI ranks as they become free: rank 0 hands them out, between two pieces of its work.

A process that no MPI launcher started does all of them itself and does not load MPI.

Source: mpi4py; the launchers' environment variables.
"""

import logging
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from unimo3.errors import ConfigError, DataError, Unimo3Error

log = logging.getLogger(__name__)

Job = TypeVar("Job")
Result = TypeVar("Result")

# Work gets a function that it calls now and then; rank 0 answers the others there.
Work = Callable[[Job, Callable[[], None]], Result]

_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS")
_REQUEST, _ANSWER = 1, 2


def communicator() -> Any:
    """MPI's world if there are several ranks, else None.

    Raises:
        ConfigError: srun started several tasks that do not know of each other.
    """
    if not any(name in os.environ for name in _LAUNCHERS):
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        if int(tasks) > 1:
            raise ConfigError(
                f"SLURM_STEP_NUM_TASKS: {tasks}: srun started several tasks without MPI, and each would do all of the "
                "work; use srun --mpi=pmix, or mpirun"
            )
        return None
    from mpi4py import MPI

    if MPI.COMM_WORLD.size > 1:
        return MPI.COMM_WORLD
    started = max(
        int(os.environ.get(name, "1")) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
    )
    if started > 1:
        raise ConfigError(
            f"MPI: {started} processes were started and each sees itself alone; the launcher and mpi4py's MPI are of "
            "different makes: use the mpirun of this environment, or an srun --mpi= that fits"
        )
    return None


def spread(comm: Any, jobs: Iterator[Job], work: Work[Job, Result], take: Callable[[Result], None]) -> None:
    """Do all jobs; every rank calls it.

    Args:
        comm: of `communicator`.
        jobs: read on rank 0 alone.
        take: what rank 0 does with each result, in the order they come.

    Raises:
        Exception: on rank 0, what `jobs`, `work` or `take` raised on any rank; the other ranks return.
    """
    if comm is None:
        for job in jobs:
            take(work(job, lambda: None))
    elif comm.rank == 0:
        _lead(comm, jobs, work, take)
    else:
        _follow(comm, work)


def failing(error: Exception) -> Iterator[Any]:
    """Jobs for `spread` that fail before the first: the other ranks are notified through the same channel."""
    raise error
    yield


def _lead(comm: Any, jobs: Iterator[Job], work: Work[Job, Result], take: Callable[[Result], None]) -> None:
    from mpi4py import MPI

    failure: list[BaseException] = []
    num_busy = comm.size - 1

    def next_job() -> Job | None:
        if failure:
            return None
        try:
            return next(jobs, None)
        except Exception as error:
            failure.append(error)
            return None

    def accept(result: Result | None, error: BaseException | None) -> None:
        try:
            if error is not None:
                raise error
            if result is not None and not failure:
                take(result)
        except Exception as raised:
            failure.append(raised)

    def answer() -> None:
        nonlocal num_busy
        status = MPI.Status()
        result, error = comm.recv(source=MPI.ANY_SOURCE, tag=_REQUEST, status=status)
        accept(result, error)
        job = next_job()
        num_busy -= job is None
        comm.send(job, dest=status.Get_source(), tag=_ANSWER)

    def answer_waiting() -> None:
        while num_busy and comm.iprobe(source=MPI.ANY_SOURCE, tag=_REQUEST):
            answer()

    while (job := next_job()) is not None:
        try:
            accept(work(job, answer_waiting), None)
        except Exception as error:
            failure.append(error)
        answer_waiting()
    while num_busy:
        answer()
    if failure:
        raise failure[0]


def _follow(comm: Any, work: Work[Job, Result]) -> None:
    result, error = None, None
    while True:
        comm.send((result, error), dest=0, tag=_REQUEST)
        job = comm.recv(source=0, tag=_ANSWER)
        if job is None:
            return
        result, error = None, None
        try:
            result = work(job, lambda: None)
        except Exception as raised:
            error = _portable(raised)


def _portable(error: Exception) -> Exception:
    """The error itself if it arrives unchanged in another process, else one with its message."""
    try:
        arrived = pickle.loads(pickle.dumps(error))
        if type(arrived) is type(error) and str(arrived) == str(error):
            return error
    except Exception as why:
        log.debug("%s does not travel: %s", type(error).__name__, why)
    return DataError(str(error)) if isinstance(error, Unimo3Error) else RuntimeError(f"{type(error).__name__}: {error}")
