"""Checks of a job's nodes before a program starts; each writes its problems as JSON into a folder that all nodes see.

    python -m slurm.preflight node --run RUN --results DIR --gpus N --local-disk DIR   once a node
    python -m slurm.preflight network --results DIR --floor GBPS                       once a rank; see slurm/network.py

Source: none.
"""

import argparse
import json
import os
import shutil
import socket
from importlib.machinery import PathFinder
from pathlib import Path

import yaml

from slurm.runs import checkpoint_bytes, newest_step
from unimo3.errors import ConfigError
from unimo3.limits import locked_memory_errors, process_limit_errors, shared_memory_errors

_MODULES = ("torch", "deepspeed", "transformers", "timm", "webdataset", "safetensors")
_MIN_FREE_BYTES = 10**9
_MIN_FREE_INODES = 1000
# A program compares its settings with the limits itself; less than this is enough for none. NCCL uses /dev/shm, too.
_MIN_FILES, _MIN_THREADS_OF_GPU, _MIN_SHARED_BYTES_OF_GPU = 256, 64, 32 * 10**6


def job_problems(run: Path, num_gpus: int) -> list[str]:
    """Problems of the job or of what all nodes use in common: other nodes would not help."""
    needed_bytes, needed_files = _needed(run)
    problems = _disk_problems(run, needed_bytes, needed_files)
    allocated = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if num_gpus and allocated.isdigit() and int(allocated) < num_gpus:
        problems.append(
            f"the job has {allocated} GPUs a node, GPUS_PER_NODE in slurm/site.env is {num_gpus}; ask for them, as "
            f"with --gpus-per-node={num_gpus}"
        )
    # Slurm gives a job's processes the limits of the shell that submitted it.
    return problems + process_limit_errors(_MIN_FILES, _MIN_THREADS_OF_GPU * max(1, num_gpus), num_gpus > 0)


def _needed(run: Path) -> tuple[int, int]:
    """Bytes and files that checkpoints still to be saved may take, in addition to those there.

    At least what the next save and the one after it take. For a new run `slurm.submit` estimates it.
    """
    try:
        step = newest_step(run)
        if step is None:
            return _MIN_FREE_BYTES, _MIN_FREE_INODES
        keep_last = int(yaml.safe_load((run / "config.yaml").read_text())["checkpoint"]["keep_last"])
        num_there = len(list((run / "checkpoints").glob("step_*/MANIFEST.json")))
        num_saves = max(2, keep_last + 1 - num_there)
        num_files = len(list((run / "checkpoints" / f"step_{step:08d}").iterdir()))
        return (
            max(_MIN_FREE_BYTES, num_saves * checkpoint_bytes(run)),
            max(_MIN_FREE_INODES, num_saves * (num_files + 1)),
        )
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return _MIN_FREE_BYTES, _MIN_FREE_INODES  # a damaged file, which resuming will name


def node_problems(results: Path, num_gpus: int, local_disk: Path) -> list[str]:
    """Problems of this node, one line each."""
    # On the path alone: `unimo3.before_imports` would import torch to prepare what is looked for.
    problems = [f"Python cannot find {name}" for name in _MODULES if PathFinder.find_spec(name) is None]
    if not results.is_dir():
        problems.append(f"{results} is not visible: is the shared folder mounted?")
    if num_gpus:
        problems += _gpu_problems(num_gpus)
    problems += shared_memory_errors(_MIN_SHARED_BYTES_OF_GPU * max(1, num_gpus))
    problems += address_problems()
    if not _is_on_one_host():
        problems += locked_memory_errors()
    return problems + _disk_problems(local_disk, _MIN_FREE_BYTES, _MIN_FREE_INODES)


def address_problems() -> list[str]:
    """The problem of a node whose own name leads to itself alone: gloo would have the others connect there."""
    if _is_on_one_host() or os.environ.get("GLOO_SOCKET_IFNAME"):
        return []
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return [f"the hostname {name} does not resolve ({error}); add it to /etc/hosts or DNS"]
    if not address.startswith("127."):
        return []
    return [
        f"the hostname {name} resolves to {address}, which other nodes cannot reach, and gloo would listen on it; "
        "export GLOO_SOCKET_IFNAME=INTERFACE in slurm/site.env, or correct /etc/hosts"
    ]


def _is_on_one_host() -> bool:
    # The address may be a name, even of the only node.
    has_one_node = os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1"
    return has_one_node or os.environ.get("MASTER_ADDR", "127.").startswith("127.")


def _gpu_problems(num_gpus: int) -> list[str]:
    import torch

    try:
        count = torch.cuda.device_count()
        if count < num_gpus:
            return [f"{count} GPUs are visible, but the job has {num_gpus} on this node"]
        for number in range(num_gpus):
            free, total = torch.cuda.mem_get_info(number)
            if free < 0.9 * total:
                return [f"GPU {number} has {free / 1e9:.1f} of {total / 1e9:.1f} GB free: something else runs on it"]
    except RuntimeError as error:
        return [f"a GPU does not answer ({error})"]
    return []


def _disk_problems(folder: Path, least_bytes: int, least_files: int) -> list[str]:
    probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("probe")
        probe.unlink()
        free = shutil.disk_usage(folder).free
        inodes = os.statvfs(folder)
    except OSError as error:
        return [f"{folder}: cannot be written ({error.strerror})"]
    problems = []
    if free < least_bytes:
        problems.append(f"{folder}: {free / 1e9:.2f} GB are free, {least_bytes / 1e9:.2f} are needed")
    if inodes.f_files and inodes.f_favail < least_files:
        problems.append(f"{folder}: {inodes.f_favail} inodes are free, {least_files} are needed")
    return problems


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m slurm.preflight", description=__doc__)
    parser.add_argument("check", choices=("node", "network"))
    parser.add_argument("--run", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--local-disk", type=Path, default=Path("/tmp"))
    parser.add_argument("--floor", type=float, default=0.0)
    args = parser.parse_args()
    if args.check == "node":
        name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        of_job = job_problems(args.run, args.gpus)
        problems = node_problems(args.results, 0 if of_job else args.gpus, args.local_disk)
        for problem in of_job + problems:
            print(f"pre-flight: {name}: {problem}", flush=True)
        _write(args.results / f"{name}.json", {"problems": problems, "job": of_job})
        return
    from slurm import network

    try:
        measured = network.measure(args.floor)
        lines = [f"{node}: {seen}" for node, seen in measured["gpus"].items()]
        lines += [f"an all-reduce over all ranks runs at {measured['gbps']:.2f} GB/s", *measured["problems"]]
        lines += [f"{node}: {problem}" for node, problem in measured["nodes"].items()]
    except ConfigError as error:
        measured, lines = {"problems": [], "nodes": {}, "job": error.errors}, error.errors
    if os.environ["RANK"] == "0":
        print("".join(f"pre-flight: {line}\n" for line in lines), end="", flush=True)
        _write(args.results / "network.json", measured)
    os._exit(0)  # gloo's threads may abort a process that takes itself apart


def _write(path: Path, content: dict[str, object]) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(content))
    path.with_suffix(".tmp").replace(path)


if __name__ == "__main__":
    main()
