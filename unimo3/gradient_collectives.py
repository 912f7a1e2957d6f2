"""The collectives of `distributed` that have gradients, as functions of autograd.

Source: none.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unimo3.distributed import world


class GatherRows(torch.autograd.Function):
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


class ExchangeRows(torch.autograd.Function):
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
