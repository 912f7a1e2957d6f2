"""Limits of a host and of its processes that a run would meet later: each error names the limit and the setting.

Source: shm_overview(7), setrlimit(2); torch.multiprocessing, which passes batches on through /dev/shm.
"""

import os
import resource
from pathlib import Path

SHARED_MEMORY, ADAPTERS = "/dev/shm", Path("/sys/class/infiniband")
# Importing torch and DeepSpeed takes nearly as much; a GPU's memory and the host's are mapped in addition.
_MIN_ADDRESSES = 2**31
_PASSED_ON = "Slurm passes on that of the shell that submits"


def shared_memory_errors(needed_bytes: int) -> list[str]:
    """An error if shared memory has no room for the batches of all readers of this host.

    Args:
        needed_bytes: of all ranks together.
    """
    if not needed_bytes:
        return []
    try:
        free = os.statvfs(SHARED_MEMORY).f_bavail * os.statvfs(SHARED_MEMORY).f_frsize
    except OSError as error:
        return [f"{SHARED_MEMORY}: cannot be used ({error.strerror}); mount it as tmpfs"]
    if free >= needed_bytes:
        return []
    return [
        f"{SHARED_MEMORY}: {free / 1e6:.0f} MB are free, readers and ranks need up to {needed_bytes / 1e6:.0f} MB; "
        "enlarge it (a container's --shm-size), or lower data.num_workers or data.prefetch"
    ]


def process_limit_errors(num_files: int, num_threads: int, has_gpu: bool) -> list[str]:
    """Errors of the limits that a shell's ulimit sets.

    Args:
        num_files: open in one process at a time.
        num_threads: still to be started on this host.
    """
    errors = []
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if _is_below(limit, num_files):
        errors.append(
            f"ulimit -n: {limit} open files, up to {num_files} are needed; raise it ({_PASSED_ON}), or lower "
            "data.num_workers or data.prefetch"
        )
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if os.geteuid() != 0 and _is_below(limit, needed := _num_threads_of_user() + num_threads):
        errors.append(
            f"ulimit -u: {limit} processes and threads of this user, up to {needed} are needed; raise it "
            f"({_PASSED_ON}), or lower data.num_workers"
        )
    return errors + address_errors(has_gpu)


def address_errors(has_gpu: bool = False) -> list[str]:
    """An error if a process has too few addresses to import torch and DeepSpeed."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or not (has_gpu or limit < _MIN_ADDRESSES):
        return []
    return [f"ulimit -v: {limit // 1024} kB of addresses are too few; set it to unlimited ({_PASSED_ON})"]


def locked_memory_errors() -> list[str]:
    """An error if this host's InfiniBand cannot lock the memory that it transfers."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or not any(ADAPTERS.glob("*")):
        return []
    return [
        f"ulimit -l: {limit // 1024} kB of locked memory, InfiniBand needs it unlimited; set LimitMEMLOCK=infinity for "
        "slurmd and PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
    ]


def _is_below(limit: int, needed: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < needed


def _num_threads_of_user() -> int:
    number = 0
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and process.stat().st_uid == os.geteuid():
                number += sum(1 for _ in (process / "task").iterdir())
        except OSError:
            continue  # it has ended meanwhile
    return number
