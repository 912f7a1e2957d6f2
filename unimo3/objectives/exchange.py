"""Collectives with gradients: what lets N ranks compute one batch's losses.

With them, the loss averaged over ranks and its gradients equal those of one process on the concatenated batch.
Without a process group (or with one rank) they return their input's rows.

Source: ALBEF, arXiv 2107.07651, gathers features the same way but without a gradient.
"""

# Shapes: R ranks, B samples a rank (equal on all ranks).

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

    Only rows that change owner travel, so memory stays at B rows a rank.

    Args:
        x: this rank's rows, [B, ...].
        source: [R B] on every rank alike: row `source[i]` of the concatenated batch becomes row i.

    Returns:
        This rank's rows of the result, [B, ...].
    """
    rank, size = world()
    batch = x.shape[0]
    owner, local = source // batch, source % batch
    if size == 1:
        return x[local.to(x.device)]
    target = torch.arange(size * batch, device=source.device) // batch
    send_rows = [local[(owner == rank) & (target == to)] for to in range(size) if to != rank]
    send_sizes = [int(((owner == rank) & (target == to)).sum()) if to != rank else 0 for to in range(size)]
    mine = owner[rank * batch : (rank + 1) * batch]
    receive_sizes = [int((mine == of).sum()) if of != rank else 0 for of in range(size)]
    outgoing = x[torch.cat(send_rows).to(x.device)]
    incoming = _ExchangeRows.apply(outgoing, receive_sizes, send_sizes)
    # Row i of the result: a row of x when it stays, else the next one received from its owner.
    index = local[rank * batch : (rank + 1) * batch].clone()
    start = batch
    for of, received in enumerate(receive_sizes):
        if received:
            index[mine == of] = torch.arange(start, start + received, device=index.device)
            start += received
    return torch.cat([x, incoming])[index.to(x.device)]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rank, size = world()
        ctx.batch = x.shape[0]
        rows = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.rank * ctx.batch : (ctx.rank + 1) * ctx.batch]


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, receive_sizes: list[int], send_sizes: list[int]) -> Tensor:
        ctx.receive_sizes, ctx.send_sizes = receive_sizes, send_sizes
        received = x.new_empty(sum(receive_sizes), *x.shape[1:])
        dist.all_to_all_single(received, x.contiguous(), receive_sizes, send_sizes)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        returned = grad.new_empty(sum(ctx.send_sizes), *grad.shape[1:])
        dist.all_to_all_single(returned, grad.contiguous(), ctx.send_sizes, ctx.receive_sizes)
        return returned, None, None
