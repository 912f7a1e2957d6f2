"""A kernel of cross-layer attention as torch calls it, with its gradient.

Eager code calls a `torch.autograd.Function`, which costs the host a quarter of an operator's call. Whatever looks into
a step, such as ``torch.compile``, fake tensors, FLOP counters and functorch, gets a custom operator instead: it has
shapes without values and a cost. Both run the same code on the device.

Source: torch.autograd.Function; torch.library's custom operators.
"""

# Shapes: B batch, H heads, T queries, V keys of a level, S levels, d head width.

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula


class Inputs(NamedTuple):
    """What is attended: as in `cross_layer_attention`, with one mask a level or none at all, and dropout's seed [1]."""

    q: Tensor
    k: Sequence[Tensor]
    v: Sequence[Tensor]
    gate: Tensor | None
    masks: Sequence[Tensor]
    seed: Tensor | None
    dropout_p: float

    @property
    def longest(self) -> int:
        """Keys of the longest level."""
        return max(key.shape[2] for key in self.k)


class Outputs(NamedTuple):
    """The result [B, H, T, d], and for each query and level a log-sum-exp [B, H, S, T], in the kernel's own base."""

    out: Tensor
    lse: Tensor


class Grads(NamedTuple):
    """Gradients of q, k and v, and each query's D [B, H, S, T], which is the gate's; k's and v's are dense."""

    q: Tensor
    offsets: Tensor
    k: list[Tensor]
    v: list[Tensor]


Attend = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Tensor | None, Sequence[Tensor] | None, float], Tensor]


def make_operator(
    name: str,
    fill_outputs: Callable[[Inputs, Outputs], None],
    fill_grads: Callable[[Inputs, Tensor, Tensor, Grads], None],
) -> Attend:
    """Register ``unimo3::NAME`` and its backward pass, and make what eager code calls.

    Args:
        fill_outputs: (inputs, outputs) -> writes all of the outputs.
        fill_grads: (inputs, gradient of the result, lse, grads) -> writes all of the grads. Neither is called where
            there is no query.

    Returns:
        What computes the reference's result.
    """

    def attended(inputs: Inputs) -> Outputs:
        outputs = _empty_outputs(inputs.q, inputs.k)
        if inputs.q.numel():
            fill_outputs(inputs, outputs)
        return outputs

    def differentiated(inputs: Inputs, grad_out: Tensor, lse: Tensor) -> Grads:
        grads = _empty_grads(inputs.q, inputs.k, inputs.v, lse)
        if inputs.q.numel():
            fill_grads(inputs, dense_rows(grad_out), lse, grads)
        else:
            for grad in (*grads.k, *grads.v):
                grad.zero_()
        return grads

    @torch.library.custom_op(f"unimo3::{name}", mutates_args=())
    def forward(
        q: Tensor,
        k: list[Tensor],
        v: list[Tensor],
        gate: Tensor | None,
        masks: list[Tensor],
        seed: Tensor | None,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        outputs = attended(Inputs(q, k, v, gate, masks, seed, dropout_p))
        return outputs.out, outputs.lse

    @torch.library.custom_op(f"unimo3::{name}_backward", mutates_args=())
    def backward(
        grad_out: Tensor,
        q: Tensor,
        k: list[Tensor],
        v: list[Tensor],
        gate: Tensor | None,
        masks: list[Tensor],
        lse: Tensor,
        seed: Tensor | None,
        dropout_p: float,
    ) -> list[Tensor]:
        return _listed(differentiated(Inputs(q, k, v, gate, masks, seed, dropout_p), grad_out, lse))

    def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        q, k, v, gate, masks, seed, ctx.dropout_p = inputs
        ctx.num_levels, ctx.num_masks = len(k), len(masks)
        ctx.save_for_backward(q, gate, seed, output[1], *k, *v, *masks)
        ctx.mark_non_differentiable(output[1])

    def gradients(ctx: Any, grad_out: Tensor, _: Any) -> tuple:
        q, gate, seed, lse, *rest = ctx.saved_tensors
        levels = ctx.num_levels
        k, v, masks = rest[:levels], rest[levels : 2 * levels], rest[2 * levels :]
        grad_q, offsets, *grads = backward(grad_out, q, k, v, gate, masks, lse, seed, ctx.dropout_p)
        return grad_q, grads[:levels], grads[levels:], _grad_of_gate(gate, offsets), [None] * ctx.num_masks, None, None

    forward.register_fake(lambda q, k, *_: tuple(_empty_outputs(q, k)))
    backward.register_fake(lambda grad_out, q, k, v, gate, masks, lse, *_: _listed(_empty_grads(q, k, v, lse)))
    forward.register_autograd(gradients, setup_context=save)
    operators = torch.ops.unimo3
    register_flop_formula(getattr(operators, name))(lambda q, k, *_, **__: 2 * _flops_of_a_product(q, k))
    # The scores again, and four products for the gradients.
    register_flop_formula(getattr(operators, f"{name}_backward"))(
        lambda grad_out, q, k, *_, **__: 5 * _flops_of_a_product(q, k)
    )

    class CrossLayerAttention(torch.autograd.Function):
        """In eager code: levels and masks follow the other inputs, since a Function takes no lists of tensors."""

        @staticmethod
        def forward(
            ctx: Any, q: Tensor, gate: Tensor | None, seed: Tensor | None, dropout_p: float, levels: int, *rest: Tensor
        ) -> Tensor:
            outputs = attended(_from_flat(q, gate, seed, dropout_p, levels, rest))
            ctx.dropout_p, ctx.levels = dropout_p, levels
            ctx.save_for_backward(q, gate, seed, outputs.lse, *rest)
            return outputs.out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad_out: Tensor) -> tuple:
            q, gate, seed, lse, *rest = ctx.saved_tensors
            inputs = _from_flat(q, gate, seed, ctx.dropout_p, ctx.levels, rest)
            grads = differentiated(inputs, grad_out, lse)
            grad_gate = _grad_of_gate(gate, grads.offsets)
            return grads.q, grad_gate, None, None, None, *grads.k, *grads.v, *[None] * len(inputs.masks)

    def attend(
        q: Tensor,
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        gate: Tensor | None,
        masks: Sequence[Tensor] | None,
        dropout_p: float,
    ) -> Tensor:
        # A tensor, drawn where q is: nothing waits for its value, and checkpointing draws the same again.
        seed = torch.randint(2**63 - 1, (1,), device=q.device) if dropout_p > 0 else None
        if _is_eager(q):
            eager: Tensor = CrossLayerAttention.apply(q, gate, seed, dropout_p, len(k), *k, *v, *(masks or ()))
            return eager
        out: Tensor = forward(q, list(k), list(v), gate, list(masks or ()), seed, dropout_p)[0]
        return out

    return attend


def _is_eager(q: Tensor) -> bool:
    """Whether nothing but autograd looks at this call."""
    return (
        not torch.compiler.is_compiling()
        and type(q) is Tensor
        and not q.is_meta
        and not torch._C._len_torch_dispatch_stack()  # FakeTensorMode, FlopCounterMode and their like
        and not torch._C._are_functorch_transforms_active()  # vmap and its like
    )


def _from_flat(
    q: Tensor, gate: Tensor | None, seed: Tensor | None, dropout_p: float, levels: int, rest: Sequence[Tensor]
) -> Inputs:
    """`rest` has each level's keys, then its values, then its mask if there are masks."""
    k, v, masks = rest[:levels], rest[levels : 2 * levels], rest[2 * levels :]
    return Inputs(q, k, v, gate, masks, seed, dropout_p)


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension has strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_outputs(q: Tensor, k: Sequence[Tensor]) -> Outputs:
    batch, heads, tokens, _ = q.shape
    return Outputs(_like_projection(q), q.new_empty(batch, heads, len(k), tokens, dtype=torch.float32))


def _empty_grads(q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], lse: Tensor) -> Grads:
    grad_k, grad_v = ([level.new_empty(level.shape) for level in levels] for levels in (k, v))
    return Grads(_like_projection(q), torch.empty_like(lse), grad_k, grad_v)


def _listed(grads: Grads) -> list[Tensor]:
    return [grads.q, grads.offsets, *grads.k, *grads.v]


def _grad_of_gate(gate: Tensor | None, offsets: Tensor) -> Tensor | None:
    """[B, T, H, S] of D [B, H, S, T]."""
    return None if gate is None else offsets.permute(0, 3, 1, 2).to(gate.dtype)


def _like_projection(q: Tensor) -> Tensor:
    """An empty [B, H, T, d] that lies in memory as [B, T, H d], as linear maps give and take it."""
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _flops_of_a_product(q: Any, k: Sequence[Any]) -> int:
    """Of queries with the keys of all levels, given their shapes."""
    batch, heads, tokens, width = q
    return sum(2 * batch * heads * tokens * width * key[2] for key in k)
