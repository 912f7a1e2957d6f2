"""The operation's formula with explicit loops, and drawn inputs for it."""

import torch

from unimo3.kernels.cross_layer_attention.dropout import draw_bits, draw_seed, retained_keys


def written_out(q, levels, gate, mask, dropout=None):
    """Level by level; a sample without keys gives zeros. `dropout` [B, H, T, V] multiplies every level's weights.

    `mask` is one for all levels, a list of one a level, or None. Shapes are those of `cross_layer_attention`.
    """
    q = q.transpose(1, 2)
    out = torch.zeros_like(q)
    for index, level in enumerate(levels):
        k, v = (part.transpose(1, 2) for part in level.unbind(2))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        readable = mask[index] if isinstance(mask, list) else mask
        if readable is not None:
            scores = scores.masked_fill(~readable[:, None, None, :], -torch.inf)
        weights = torch.nan_to_num(scores.softmax(-1))
        if dropout is not None:
            weights = weights * dropout[..., : scores.shape[-1]]
        level_gate = 1 / len(levels) if gate is None else gate[..., index].transpose(1, 2)[..., None]
        out = out + level_gate * (weights @ v)
    return out.transpose(1, 2)


def doubled(tensor):
    """A separate leaf in float64."""
    return None if tensor is None else tensor.detach().double().requires_grad_()


def gradients(out, inputs):
    """Of a sum of all outputs with weights that differ."""
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape).to(out.dtype)
    return torch.autograd.grad((out * weight).sum(), inputs)


def assert_close_to_formula(q, levels, gate, mask, out, dropout=None, tolerance=5e-6):
    """Compare an output and all its gradients with the formula in float64, relative to the largest if above 1."""
    inputs = [q, *levels, *([] if gate is None else [gate])]
    exact_q, exact_levels, exact_gate = doubled(q), [doubled(x) for x in levels], doubled(gate)
    exact_inputs = [exact_q, *exact_levels, *([] if gate is None else [exact_gate])]
    exact = written_out(exact_q, exact_levels, exact_gate, mask, dropout)
    pairs = [(out, exact)]
    for one, other in zip(gradients(out, inputs), gradients(exact, exact_inputs), strict=True):
        # Keys and values of a level are compared apart: their gradients differ in size.
        pairs += zip(one.unbind(2), other.unbind(2), strict=True) if one.dim() == 5 else [(one, other)]
    sizes = [other.abs().max().item() if other.numel() else 0.0 for _, other in pairs]
    for (one, other), size in zip(pairs, sizes, strict=True):
        # Single values may come from terms that cancel. With one key all of k's and q's gradient do: the remainder are
        # the roundings of terms that are as large as those of the other gradients.
        largest = size if size > 1e-12 else max(sizes)
        torch.testing.assert_close(one.double(), other, atol=tolerance * max(1.0, largest), rtol=0)


def strided(x):
    """The same values, with tokens next to each other in memory, as [B, H, T, d] has them."""
    return x.detach().transpose(1, -2).contiguous().transpose(1, -2).requires_grad_()


def transposed(x):
    """The same values with a last dimension that has strides."""
    return x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()


def unaligned(x):
    """The same values, which start between multiples of 16 bytes."""
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
    return shifted.copy_(x.detach()).requires_grad_()


def assert_dropout_is_the_formulas(attend, drawn, dropout_p=0.4, seed=5, tolerance=5e-6):
    """Compare output and gradients with the formula, given the bits of the seed, and check the bits themselves.

    `attend` draws its seed from torch's generator as `draw_seed` does.
    """
    q, levels, gate, mask = drawn
    batch, tokens, heads, _ = q.shape
    keys = max(level.shape[1] for level in levels)
    torch.manual_seed(seed)
    bits = draw_bits(draw_seed(q.device), batch, heads, tokens, keys, dropout_p)
    survives = retained_keys(bits, tokens, keys)
    deviation = (dropout_p * (1 - dropout_p) / survives.numel()) ** 0.5
    assert abs(survives.double().mean().item() - (1 - dropout_p)) < 5 * deviation
    # Samples and heads draw for themselves.
    first, *others = survives.flatten(0, 1)
    assert all((first != other).any() for other in others)
    torch.manual_seed(seed)
    out = attend(q, levels, gate, mask, dropout_p)
    assert_close_to_formula(q, levels, gate, mask, out, survives.double() / (1 - dropout_p), tolerance)


def draw_uneven(lengths, dtype, batch=2, heads=2, tokens=19, width=32, seed=0):
    """As `draw`, with levels of these lengths and a mask for each; the first level's first sample is unreadable."""
    drawn = [
        draw((batch, heads, tokens, keys, width, 1), False, False, seed + i, dtype) for i, keys in enumerate(lengths)
    ]
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(batch, keys, generator=generator) < 0.7 for keys in lengths]
    masks[0][0] = False
    gate = torch.randn(batch, tokens, heads, len(lengths), generator=generator).to(dtype).requires_grad_()
    return drawn[0][0], [one[1][0] for one in drawn], gate, masks


def draw(shape, masked, gated, seed=0, dtype=torch.float64):
    """q, levels, gate, mask of sizes (B, H, T, V, d, S); with `masked` the first of several samples reads nothing."""
    batch, heads, tokens, keys, width, num_levels = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    q = normal(batch, tokens, heads, width)
    levels = [normal(batch, keys, 2, heads, width) for _ in range(num_levels)]
    gate = normal(batch, tokens, heads, num_levels) if gated else None
    mask = torch.rand(batch, keys, generator=generator) < 0.6 if masked else None
    if mask is not None and batch > 1:
        mask[0] = False
    return q, levels, gate, mask
