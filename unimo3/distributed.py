"""The process group and its collectives: one rank a process, from the environment a launcher sets.

`gather_rows` and `take_rows` have gradients: they let N ranks compute one batch's losses. The loss averaged over ranks
and its gradients equal those of one process on the concatenated batch. Without a process group (or with one rank) a
collective returns its input.

torch is imported where it is used: programs that only read files call `world` and `on_all_ranks` too.

Source: DeepSpeed's init_distributed; the variables are those of torchrun and of this project's Slurm scripts. ALBEF,
arXiv 2107.07651, gathers features the same way but without a gradient.
"""

# Shapes: R ranks, B samples a rank (equal on all ranks).

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unimo3.errors import CHECK_MOUNT, CheckpointError, ConfigError, Unimo3Error, UnreachableError, no_answer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process's rank, and the number of ranks."""

    rank: int
    local_rank: int
    size: int


def world_size_from_environment() -> int:
    """Number of ranks this process was started with, before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init() -> World:
    """Join the process group: NCCL where there is a GPU, else gloo. A process without a launcher is a world of one.

    Raises:
        ConfigError: there are other ranks, and the environment does not name the address to join them; or ranks would
            share a GPU.
    """
    import deepspeed
    import torch
    import torch.distributed as dist

    from unimo3.launch import free_port

    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if world_size_from_environment() > 1 and missing:
        raise ConfigError(
            f"{', '.join(missing)}: not in the environment, though WORLD_SIZE is {os.environ['WORLD_SIZE']}; set RANK "
            "to this process's number, LOCAL_RANK to that on its host, MASTER_ADDR and MASTER_PORT to a host and port "
            "that all ranks share"
        )
    if world_size_from_environment() == 1:
        # Alone it meets nobody, whatever address another program has left in the environment.
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(free_port())
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        choose_gpu()
    else:
        # DeepSpeed would compile it here, half a minute on a new machine; only its inference engine calls it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return World(dist.get_rank(), local_rank, dist.get_world_size())


# Through which ranks agreed before they joined a group: the group's own has the same server.
_stores: list[Any] = []


def choose_gpu() -> str:
    """Choose this rank's GPU before it joins a group; every rank calls it.

    It is the GPU with the number of the local rank, modulo those that the rank sees: Slurm may show each task its own
    alone. LOCAL_RANK is set to its index, for which DeepSpeed takes it.

    Returns:
        What the rank sees, in words.

    Raises:
        ConfigError: on every rank; two would have the same GPU.
    """
    import torch
    from torch.distributed.rendezvous import rendezvous

    local_rank, size, count = int(os.environ["LOCAL_RANK"]), world_size_from_environment(), torch.cuda.device_count()
    index = local_rank % count
    torch.cuda.set_device(index)
    os.environ["LOCAL_RANK"] = str(index)
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)  # DeepSpeed refuses another value
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = f"local rank {local_rank} sees {count} GPUs ({visible or 'all'}) and takes number {index}"
    if size == 1:
        return seen
    store = next(rendezvous("env://"))[0]
    _stores.append(store)
    if store.add(f"gpu {torch.cuda.get_device_properties(index).uuid}", 1) > 1:
        store.set(
            "shared gpu",
            f"CUDA_VISIBLE_DEVICES: {visible!r}: rank {os.environ['RANK']} on {socket.gethostname()} would share a GPU "
            f"with another: {seen}; request one GPU per rank (--gpus-per-node), or start fewer ranks "
            "(--ntasks-per-node, unimo3.launch -n)",
        )
    if store.add("gpus", 1) == size:
        store.set("all gpus", "")
    store.wait(["all gpus"])
    if store.check(["shared gpu"]):
        raise ConfigError(store.get("shared gpu").decode())
    return seen


def _process_group() -> Any:
    """`torch.distributed` in a process that has joined a group, else None; torch is not imported for the answer."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a process group."""
    dist = _process_group()
    return (dist.get_rank(), dist.get_world_size()) if dist else (0, 1)


def barrier() -> None:
    """Wait for all ranks."""
    if world()[1] > 1:
        _process_group().barrier()


def all_gather_object(value: Any, group: Any = None) -> list[Any]:
    """Every rank's `value`, in rank order; `group` is another one of all ranks than the default."""
    size = world()[1]
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    _process_group().all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`."""
    values = [value]
    if world()[1] > 1:
        _process_group().broadcast_object_list(values, src=0)
    return values[0]


def on_all_ranks(doing: str, action: Callable[[], Any], fix: str, group: Any = None) -> list[Any]:
    """Run `action` on every rank and return all results; it succeeds on every rank or fails on every rank.

    No rank waits for one that failed: this is the vote of a two-phase commit.

    Args:
        doing: what it is, for the message.
        fix: what to do, unless the errors contain it.
        group: to agree through; the default group if none.

    Raises:
        UnreachableError: on every rank, if it failed on some and for all of them because storage gave no answer.
        CheckpointError: on every rank, if it failed on any for another reason.
    """
    results = all_gather_object(_attempt(action), group)
    _raise_failures(doing, {rank: failed for rank, (_, failed) in enumerate(results) if failed}, fix)
    return [returned for returned, _ in results]


def from_first_rank(doing: str, action: Callable[[], Any], fix: str) -> Any:
    """Run `action` on rank 0 alone and return its result on every rank; every rank calls it.

    A broadcast: a gather would fill up every rank's part to the size of the result.

    Args:
        doing, fix: see `on_all_ranks`, as the errors.
    """
    result, failed = broadcast_object(_attempt(action) if world()[0] == 0 else None)
    _raise_failures(doing, {0: failed} if failed else {}, fix)
    return result


_Failure = tuple[str, bool, bool]
"""Message, whether the message has a fix, and whether storage gave no answer."""


def _attempt(action: Callable[[], Any]) -> tuple[Any, _Failure | None]:
    """The result of an action, or its failure."""
    try:
        return action(), None
    except Exception as error:  # of any type: the other ranks must learn of it
        silent = no_answer(error)
        reason = silent or error
        has_fix = isinstance(reason, Unimo3Error)
        return None, (str(reason) if has_fix else f"{type(reason).__name__}: {reason}", has_fix, silent is not None)


def _raise_failures(doing: str, failures: dict[int, _Failure], fix: str) -> None:
    if not failures:
        return
    lines = [f"rank {rank}: {message}" for rank, (message, *_) in failures.items()]
    more = f"; and {len(lines) - 4} more ranks" if len(lines) > 4 else ""
    kind = UnreachableError if all(is_silent for *_, is_silent in failures.values()) else CheckpointError
    fix = CHECK_MOUNT if kind is UnreachableError else fix
    end = "" if all(has_fix for _, has_fix, _ in failures.values()) else f"; {fix}"
    raise kind(f"{doing} failed ({'; '.join(lines[:4])}{more}){end}")


def gather_rows(x: Tensor) -> Tensor:
    """[B, ...] on every rank -> [R B, ...] in rank order, with gradient to every rank's rows."""
    if world()[1] == 1:
        return x
    from unimo3.gradient_collectives import GatherRows

    gathered: Tensor = GatherRows.apply(x)
    return gathered


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's `x`, without gradient."""
    total = x.detach().clone()
    if world()[1] > 1:
        _process_group().all_reduce(total)
    return total


def take_rows(x: Tensor, source: Tensor) -> Tensor:
    """Fetch rows of the concatenated batch, wherever they are, with gradient to their owner.

    Only rows that change owner travel, and to each rank once however often it wants them: a rank receives at most B.

    Args:
        x: this rank's rows, [B, ...].
        source: [R B] the same on every rank: row `source[i]` of the concatenated batch becomes row i.

    Returns:
        This rank's rows of the result, [B, ...].
    """
    rank, size = world()
    batch = x.shape[0]
    if size == 1:
        return x[source.to(x.device)]
    import torch

    from unimo3.gradient_collectives import ExchangeRows

    owner, local = source.view(size, batch) // batch, source.view(size, batch) % batch
    stays = source.new_empty(0)
    sent = [local[to, owner[to] == rank].unique() if to != rank else stays for to in range(size)]
    received = [local[rank, owner[rank] == of].unique() if of != rank else stays for of in range(size)]
    outgoing = x[torch.cat(sent).to(x.device)]
    incoming = ExchangeRows.apply(outgoing, [len(rows) for rows in received], [len(rows) for rows in sent])
    # Row i of the result: a row of x when it stays, else the index of the row received from its owner.
    index = local[rank].clone()
    start = batch
    for of, rows in enumerate(received):
        if of != rank:
            index[owner[rank] == of] = start + torch.searchsorted(rows, local[rank, owner[rank] == of])
        start += len(rows)
    return torch.cat([x, incoming])[index.to(x.device)]
