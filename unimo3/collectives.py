"""Collectives with gradients: what lets N ranks compute one batch's losses.

With them, the loss averaged over ranks and its gradients equal those of one process on the concatenated batch.
Without a process group (or with one rank) they return their input's rows.

Source: ALBEF, arXiv 2107.07651, gathers features the same way but without a gradient.
"""

# Shapes: R ranks, B samples a rank (equal on all ranks).

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unimo3.distributed import world


def gather_rows(x: Tensor) -> Tensor:
    """[B, ...] on every rank -> [R B, ...] in rank order, with gradient to every rank's rows."""
    return x if world()[1] == 1 else _GatherRows.apply(x)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's `x`, without gradient."""
    total = x.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(total)
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
    owner, local = source.view(size, batch) // batch, source.view(size, batch) % batch
    stays = source.new_empty(0)
    sent = [local[to, owner[to] == rank].unique() if to != rank else stays for to in range(size)]
    received = [local[rank, owner[rank] == of].unique() if of != rank else stays for of in range(size)]
    outgoing = x[torch.cat(sent).to(x.device)]
    incoming = _ExchangeRows.apply(outgoing, [len(rows) for rows in received], [len(rows) for rows in sent])
    # Row i of the result: a row of x when it stays, else the index of the row received from its owner.
    index = local[rank].clone()
    start = batch
    for of, rows in enumerate(received):
        if of != rank:
            index[owner[rank] == of] = start + torch.searchsorted(rows, local[rank, owner[rank] == of])
        start += len(rows)
    return torch.cat([x, incoming])[index.to(x.device)]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rank, size = world()
        ctx.batch = x.shape[0]
        rows = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.rank * ctx.batch : (ctx.rank + 1) * ctx.batch]


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, receive_sizes: list[int], send_sizes: list[int]) -> Tensor:
        ctx.receive_sizes, ctx.send_sizes = receive_sizes, send_sizes
        received = x.new_empty(sum(receive_sizes), *x.shape[1:])
        dist.all_to_all_single(received, x.contiguous(), receive_sizes, send_sizes)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        returned = grad.new_empty(sum(ctx.send_sizes), *grad.shape[1:])
        dist.all_to_all_single(returned, grad.contiguous(), ctx.send_sizes, ctx.receive_sizes)
        return returned, None, None
