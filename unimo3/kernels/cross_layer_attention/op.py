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
from torch.utils.flop_counter import register_flop_formula

from unimo3.kernels.cross_layer_attention.dropout import draw_seed


class Inputs(NamedTuple):
    """What is attended: as in `cross_layer_attention`, with dropout's bits. There are no masks, one, or one a level.

    All are contiguous: kernels compute their strides from the shapes.
    """

    q: Tensor
    levels: Sequence[Tensor]
    gate: Tensor | None
    masks: Sequence[Tensor]
    bits: Tensor | None
    dropout_p: float

    @property
    def longest(self) -> int:
        """Keys of the longest level."""
        return longest_of(self.levels)


class Outputs(NamedTuple):
    """The result [B, T, H, d], and for each query and level a log-sum-exp [B, H, S, T], in the kernel's own base."""

    out: Tensor
    lse: Tensor


class Grads(NamedTuple):
    """Gradients of q and of each level, and each query's D [B, H, S, T], which is the gate's. All are contiguous."""

    q: Tensor
    offsets: Tensor
    levels: Sequence[Tensor]


Draw = Callable[[Tensor, int, int, int, int, float], Tensor]
Attend = Callable[[Tensor, Sequence[Tensor], Tensor | None, Sequence[Tensor] | None, float], Tensor]


class Kernel(NamedTuple):
    """A kernel's parts. None of the first three is called where there is no query.

    Attributes:
        draw: dropout's bits, as `dropout.draw_bits`.
        fill_outputs: (inputs, outputs) -> writes all of the outputs.
        fill_grads: (inputs, gradient of the result, lse, grads) -> writes all of the grads.
        words_of_pair: (queries, keys of the longest level) -> words that `draw` draws for a (sample, head) pair.
    """

    draw: Draw
    fill_outputs: Callable[[Inputs, Outputs], None]
    fill_grads: Callable[[Inputs, Tensor, Tensor, Grads], None]
    words_of_pair: Callable[[int, int], int]

    def forward(self, inputs: Inputs) -> Outputs:
        """The outputs, of contiguous inputs."""
        outputs = _empty_outputs(inputs.q, inputs.levels)
        if inputs.q.numel():
            self.fill_outputs(inputs, outputs)
        return outputs

    def backward(self, inputs: Inputs, grad_out: Tensor, lse: Tensor, grads: Grads) -> Grads:
        """The grads, filled, of contiguous inputs."""
        if inputs.q.numel():
            self.fill_grads(inputs, _aligned(grad_out), lse, grads)
        else:
            for grad in grads.levels:
                grad.zero_()
        return grads


class Operators(NamedTuple):
    """A kernel's custom operators: the forward pass with its gradient, and dropout's bits."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    draw: Draw


def make_operator(
    name: str,
    draw: Draw,
    words_of_pair: Callable[[int, int], int],
    fill_outputs: Callable[[Inputs, Outputs], None],
    fill_grads: Callable[[Inputs, Tensor, Tensor, Grads], None],
) -> Attend:
    """Register ``unimo3::NAME``, its backward pass and its dropout, and make what calls them; arguments as in `Kernel`.

    Returns:
        What computes the reference's result.
    """
    kernel = Kernel(draw, fill_outputs, fill_grads, words_of_pair)
    operators, function = _register_operators(name, kernel), _make_function(kernel)

    def attend(
        q: Tensor,
        levels: Sequence[Tensor],
        gate: Tensor | None,
        masks: Sequence[Tensor] | None,
        dropout_p: float,
    ) -> Tensor:
        eager, bits = _is_eager(q), None
        if dropout_p > 0 and q.numel():
            batch, queries, heads, _ = q.shape
            drawn = draw if eager else operators.draw
            bits = drawn(draw_seed(q.device), batch, heads, queries, longest_of(levels), dropout_p)
        if eager:
            inputs = _contiguous(Inputs(q, levels, gate, masks or (), bits, dropout_p))
            rest = (*inputs.levels, *inputs.masks)
            out: Tensor = function.apply(inputs.q, inputs.gate, bits, dropout_p, len(levels), *rest)
            return out
        return operators.forward(q, list(levels), gate, list(masks or ()), bits, dropout_p)[0]

    return attend


def _make_function(kernel: Kernel) -> type[torch.autograd.Function]:
    """A kernel in eager code: levels and masks follow the other inputs, since a Function takes no lists of tensors."""

    class CrossLayerAttention(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            q: Tensor,
            gate: Tensor | None,
            bits: Tensor | None,
            dropout_p: float,
            num_levels: int,
            *rest: Tensor,
        ) -> Tensor:
            outputs = kernel.forward(Inputs(q, rest[:num_levels], gate, rest[num_levels:], bits, dropout_p))
            ctx.dropout_p, ctx.num_levels = dropout_p, num_levels
            ctx.save_for_backward(q, gate, bits, outputs.lse, *rest)
            return outputs.out

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor) -> tuple:
            if torch.is_grad_enabled():  # as once_differentiable, which costs the host 15 us
                raise RuntimeError("cross-layer attention's kernels have no second derivative; use impl='reference'")
            q, gate, bits, lse, *rest = ctx.saved_tensors
            masks = rest[ctx.num_levels :]
            inputs = Inputs(q, rest[: ctx.num_levels], gate, masks, bits, ctx.dropout_p)
            grads = kernel.backward(inputs, grad_out, lse, _allocate_grads(q, inputs.levels, lse))
            grad_gate = _grad_of_gate(gate, grads.offsets)
            return grads.q, grad_gate, None, None, None, *grads.levels, *[None] * len(masks)

    return CrossLayerAttention


def _register_operators(name: str, kernel: Kernel) -> Operators:
    """Register a kernel's custom operators, with shapes without values, a gradient and a number of operations."""

    @torch.library.custom_op(f"unimo3::{name}", mutates_args=())
    def forward(
        q: Tensor,
        levels: list[Tensor],
        gate: Tensor | None,
        masks: list[Tensor],
        bits: Tensor | None,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        outputs = kernel.forward(_contiguous(Inputs(q, levels, gate, masks, bits, dropout_p)))
        return outputs.out, outputs.lse

    @torch.library.custom_op(f"unimo3::{name}_backward", mutates_args=())
    def backward(
        grad_out: Tensor,
        q: Tensor,
        levels: list[Tensor],
        gate: Tensor | None,
        masks: list[Tensor],
        lse: Tensor,
        bits: Tensor | None,
        dropout_p: float,
    ) -> list[Tensor]:
        inputs = _contiguous(Inputs(q, levels, gate, masks, bits, dropout_p))
        grads = kernel.backward(inputs, grad_out, lse, _empty_grads(q, levels, lse))
        return [grads.q, grads.offsets, *grads.levels]

    @torch.library.custom_op(f"unimo3::{name}_dropout", mutates_args=())
    def drawn(seed: Tensor, batch: int, heads: int, queries: int, longest: int, dropout_p: float) -> Tensor:
        return kernel.draw(seed, batch, heads, queries, longest, dropout_p)

    forward.register_fake(lambda q, levels, *_: tuple(_empty_outputs(q, levels)))
    backward.register_fake(_fake_backward)
    drawn.register_fake(
        lambda seed, batch, heads, queries, longest, _: seed.new_empty(
            batch, heads, kernel.words_of_pair(queries, longest), dtype=torch.int32
        )
    )
    _register_gradient(forward, backward)
    operators = torch.ops.unimo3
    register_flop_formula(getattr(operators, name))(lambda q, levels, *_, **__: 2 * _flops_of_a_product(q, levels))
    # The scores again, and four products for the gradients.
    register_flop_formula(getattr(operators, f"{name}_backward"))(
        lambda grad_out, q, levels, *_, **__: 5 * _flops_of_a_product(q, levels)
    )
    return Operators(forward, drawn)


def _register_gradient(forward: Any, backward: Any) -> None:
    """Make one custom operator the gradient of the other."""

    def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        q, levels, gate, masks, bits, ctx.dropout_p = inputs
        ctx.num_levels, ctx.num_masks = len(levels), len(masks)
        ctx.save_for_backward(q, gate, bits, output[1], *levels, *masks)
        ctx.mark_non_differentiable(output[1])

    def gradients(ctx: Any, grad_out: Tensor, _: Any) -> tuple:
        q, gate, bits, lse, *rest = ctx.saved_tensors
        levels, masks = rest[: ctx.num_levels], rest[ctx.num_levels :]
        grad_q, offsets, *grads = backward(grad_out, q, levels, gate, masks, lse, bits, ctx.dropout_p)
        return grad_q, grads, _grad_of_gate(gate, offsets), [None] * ctx.num_masks, None, None

    forward.register_autograd(gradients, setup_context=save)


def _fake_backward(grad_out: Tensor, q: Tensor, levels: list[Tensor], gate: Any, masks: Any, lse: Tensor, *_: Any):  # type: ignore[no-untyped-def]
    grads = _empty_grads(q, levels, lse)
    return [grads.q, grads.offsets, *grads.levels]


def _is_eager(q: Tensor) -> bool:
    """Whether nothing but autograd looks at this call."""
    return (
        not torch.compiler.is_compiling()
        and type(q) is Tensor
        and not q.is_meta
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()  # FakeTensorMode, FlopCounterMode and their like
        and not torch._C._are_functorch_transforms_active()  # vmap and its like
    )


# Bytes of a thread's widest load.
ALIGNMENT = 16


def _contiguous(inputs: Inputs) -> Inputs:
    """The inputs, copied where they have other strides or start between multiples of `ALIGNMENT` bytes."""
    return Inputs(
        _aligned(inputs.q),
        [*map(_aligned, inputs.levels)],
        None if inputs.gate is None else _aligned(inputs.gate),
        [*map(_aligned, inputs.masks)],
        inputs.bits,
        inputs.dropout_p,
    )


def _aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def longest_of(levels: Sequence[Tensor]) -> int:
    """Keys of the longest of these levels."""
    return max(level.shape[1] for level in levels)


def _empty_outputs(q: Tensor, levels: Sequence[Tensor]) -> Outputs:
    batch, queries, heads, _ = q.shape
    lse = q.new_empty(batch, heads, len(levels), queries, dtype=torch.float32)
    return Outputs(q.new_empty(q.shape), lse)


def _empty_grads(q: Tensor, levels: Sequence[Tensor], lse: Tensor) -> Grads:
    return Grads(q.new_empty(q.shape), lse.new_empty(lse.shape), [level.new_empty(level.shape) for level in levels])


def _allocate_grads(q: Tensor, levels: Sequence[Tensor], lse: Tensor) -> Grads:
    """As `_empty_grads`, of one allocation if levels have one length; an operator's outputs may not share memory."""
    shapes = {level.shape for level in levels}
    if len(shapes) > 1:
        return _empty_grads(q, levels, lse)
    of_levels = q.new_empty(len(levels), *shapes.pop()).unbind()
    return Grads(q.new_empty(q.shape), lse.new_empty(lse.shape), of_levels)


def _grad_of_gate(gate: Tensor | None, offsets: Tensor) -> Tensor | None:
    """[B, T, H, S] of D [B, H, S, T]."""
    return None if gate is None else offsets.permute(0, 3, 1, 2).to(gate.dtype)


def _flops_of_a_product(q: Any, levels: Sequence[Any]) -> int:
    """Operations of queries with the keys of all levels, given their shapes."""
    batch, queries, heads, width = q
    return sum(2 * batch * heads * queries * width * level[1] for level in levels)
