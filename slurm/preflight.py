"""Checks of a job's nodes before a program starts; each writes what is wrong as JSON into a folder all share.

    python -m slurm.preflight node --run RUN --mark DIR --gpus N --local-disk DIR     once a node
    python -m slurm.preflight network --mark DIR --floor GBPS                         once a rank

Source: none.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

from slurm.runs import checkpoint_bytes

_MODULES = ("torch", "deepspeed", "transformers", "timm", "webdataset", "safetensors")
_MIN_FREE_BYTES = 10**9
_MIN_FREE_INODES = 1000
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_ROUNDS, _ELEMENTS = 4, 2**22


def job_problems(run: Path, num_gpus: int) -> list[str]:
    """What is wrong with the job or with what all nodes share: going elsewhere would not help."""
    try:
        needed = max(_MIN_FREE_BYTES, 2 * checkpoint_bytes(run))
    except (OSError, ValueError, KeyError):
        needed = _MIN_FREE_BYTES  # a damaged manifest, which resuming will name
    found = _disk_problems(run, needed)
    allocated = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if num_gpus and allocated.isdigit() and int(allocated) < num_gpus:
        found.append(
            f"the job has {allocated} GPUs a node, GPUS_PER_NODE in slurm/site.env says {num_gpus}; ask for them, as "
            f"with --gpus-per-node={num_gpus}"
        )
    return found


def node_problems(mark: Path, num_gpus: int, local_disk: Path) -> list[str]:
    """What is wrong with this node, one line a problem."""
    found = [f"Python cannot find {name}" for name in _MODULES if importlib.util.find_spec(name) is None]
    if not mark.is_dir():
        found.append(f"{mark} is not visible: is the shared folder mounted?")
    if num_gpus:
        found += _gpu_problems(num_gpus)
    return found + _disk_problems(local_disk, _MIN_FREE_BYTES)


def _gpu_problems(num_gpus: int) -> list[str]:
    import torch

    try:
        count = torch.cuda.device_count()
        if count < num_gpus:
            return [f"{count} GPUs answer, the job has {num_gpus} here"]
        for number in range(num_gpus):
            free, total = torch.cuda.mem_get_info(number)
            if free < 0.9 * total:
                return [f"GPU {number} has {free / 1e9:.1f} of {total / 1e9:.1f} GB free: something else runs on it"]
    except RuntimeError as error:
        return [f"a GPU does not answer ({error})"]
    return []


def _disk_problems(folder: Path, least_bytes: int) -> list[str]:
    probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("probe")
        probe.unlink()
        free = shutil.disk_usage(folder).free
        inodes = os.statvfs(folder)
    except OSError as error:
        return [f"{folder}: cannot be written ({error.strerror})"]
    found = []
    if free < least_bytes:
        found.append(f"{folder}: {free / 1e9:.2f} GB are free, {least_bytes / 1e9:.2f} are needed")
    if inodes.f_files and inodes.f_favail < _MIN_FREE_INODES:
        found.append(f"{folder}: {inodes.f_favail} files can still be made, {_MIN_FREE_INODES} are needed")
    return found


def network_gbps() -> float:
    """10^9 bytes a second of an all-reduce over all ranks, by the slowest round but one."""
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo")
    values = torch.ones(_ELEMENTS, device="cuda" if gpu else "cpu")
    seconds = []
    for _ in range(_ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    dist.barrier()
    return values.nbytes / sorted(seconds)[-2] / 1e9


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m slurm.preflight", description=__doc__)
    parser.add_argument("check", choices=("node", "network"))
    parser.add_argument("--run", type=Path)
    parser.add_argument("--mark", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--local-disk", type=Path, default=Path("/tmp"))
    parser.add_argument("--floor", type=float, default=0.0)
    args = parser.parse_args()
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # it is over soon; a node that is told to stop is not a bad one
    if args.check == "node":
        name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        own = job_problems(args.run, args.gpus)
        problems = node_problems(args.mark, 0 if own else args.gpus, args.local_disk)
        for problem in own + problems:
            print(f"pre-flight: {name}: {problem}", flush=True)
        _write(args.mark / f"{name}.json", {"problems": problems, "job": own})
        return
    gbps = network_gbps()
    if os.environ["RANK"] == "0":
        print(f"pre-flight: an all-reduce of {4 * _ELEMENTS / 1e6:.0f} MB runs at {gbps:.2f} GB/s", flush=True)
        slow = gbps < args.floor
        problem = f"an all-reduce runs at {gbps:.2f} GB/s, below MIN_ALLREDUCE_GBPS {args.floor:g}"
        _write(args.mark / "network.json", {"problems": [problem] if slow else [], "gbps": gbps})
    os._exit(0)  # gloo's threads may abort a process that takes itself apart


def _write(path: Path, content: dict[str, object]) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(content))
    path.with_suffix(".tmp").replace(path)


if __name__ == "__main__":
    main()
