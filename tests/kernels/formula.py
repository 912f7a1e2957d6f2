"""The operation's formula with explicit loops, and drawn inputs for it."""

import torch


def written_out(q, k, v, gate, mask, dropout=None):
    """Level by level; a sample without keys gives zeros. `dropout` [B, H, T, V] multiplies every level's weights.

    `mask` is one for all levels, a list of one a level, or None.
    """
    out = torch.zeros_like(q)
    for level in range(len(k)):
        scores = q @ k[level].transpose(-1, -2) / q.shape[-1] ** 0.5
        readable = mask[level] if isinstance(mask, list) else mask
        if readable is not None:
            scores = scores.masked_fill(~readable[:, None, None, :], -torch.inf)
        weights = torch.nan_to_num(scores.softmax(-1))
        if dropout is not None:
            weights = weights * dropout[..., : scores.shape[-1]]
        level_gate = 1 / len(k) if gate is None else gate[..., level].transpose(1, 2)[..., None]
        out = out + level_gate * (weights @ v[level])
    return out


def doubled(tensor):
    """A separate leaf in float64."""
    return None if tensor is None else tensor.detach().double().requires_grad_()


def gradients(out, inputs):
    """Of a sum of all outputs with weights that differ."""
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape).to(out.dtype)
    return torch.autograd.grad((out * weight).sum(), inputs)


def assert_close_to_formula(q, k, v, gate, mask, out, dropout=None, tolerance=5e-6):
    """Compare an output and all its gradients with the formula in float64, relative to the largest if above 1."""
    inputs = [q, *k, *v, *([] if gate is None else [gate])]
    exact_k, exact_v = [doubled(x) for x in k], [doubled(x) for x in v]
    exact_q, exact_gate = doubled(q), doubled(gate)
    exact_inputs = [exact_q, *exact_k, *exact_v, *([] if gate is None else [exact_gate])]
    exact = written_out(exact_q, exact_k, exact_v, exact_gate, mask, dropout)
    pairs = [(out, exact), *zip(gradients(out, inputs), gradients(exact, exact_inputs), strict=True)]
    sizes = [other.abs().max().item() if other.numel() else 0.0 for _, other in pairs]
    for (one, other), size in zip(pairs, sizes, strict=True):
        # Single values may come from terms that cancel. With one key all of k's and q's gradient do: the remainder are
        # the roundings of terms that are as large as those of the other gradients.
        largest = size if size > 1e-12 else max(sizes)
        torch.testing.assert_close(one.double(), other, atol=tolerance * max(1.0, largest), rtol=0)


def strided(x):
    """The same values, rows apart in memory as a linear map's heads are."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


def transposed(x):
    """The same values with a last dimension that has strides."""
    return x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()


def assert_dropout_is_the_formulas(attend, drawn, dropout_p=0.4, seed=5):
    """Read from the result which keys were retained, then compare output and gradients with the formula.

    Values that are one-hot vectors of the keys' indices give the mixed weights, and so the retained keys. The gates
    have one sign, since levels that cancel would hide a key.
    """
    q, k, v, gate, mask = drawn
    batch, heads, keys, width = k[0].shape
    one_hot = [torch.eye(keys, width, device=q.device).expand(batch, heads, keys, width)] * len(k)
    gates = gate.detach().softmax(dim=-1)
    torch.manual_seed(seed)
    dropped = attend(q, k, one_hot, gates, None, dropout_p)[..., :keys].detach()
    full = attend(q, k, one_hot, gates, None)[..., :keys].detach()
    factors = (dropped / full).double()
    survives = factors > 0
    torch.testing.assert_close(
        factors[survives], torch.full_like(factors[survives], 1 / (1 - dropout_p)), atol=1e-3, rtol=0
    )
    deviation = (dropout_p * (1 - dropout_p) / survives.numel()) ** 0.5
    assert abs(survives.double().mean().item() - (1 - dropout_p)) < 5 * deviation
    # Samples and heads draw for themselves.
    first, *others = survives.flatten(0, 1)
    assert all((first != other).any() for other in others)
    torch.manual_seed(seed)
    out = attend(q, k, v, gate, mask, dropout_p)
    assert_close_to_formula(q, k, v, gate, mask, out, survives.double() / (1 - dropout_p))


def draw_uneven(lengths, dtype, batch=2, heads=2, tokens=19, width=32, seed=0):
    """As `draw`, with levels of these lengths and a mask for each; the first level's first sample is unreadable."""
    drawn = [
        draw((batch, heads, tokens, keys, width, 1), False, False, seed + i, dtype) for i, keys in enumerate(lengths)
    ]
    k, v = [one[1][0] for one in drawn], [one[2][0] for one in drawn]
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(batch, keys, generator=generator) < 0.7 for keys in lengths]
    masks[0][0] = False
    gate = torch.randn(batch, tokens, heads, len(lengths), generator=generator).to(dtype).requires_grad_()
    return drawn[0][0], k, v, gate, masks


def draw(shape, masked, gated, seed=0, dtype=torch.float64):
    """q, k, v, gate, mask of sizes (B, H, T, V, d, S); with `masked` the first of several samples can read nothing."""
    batch, heads, tokens, keys, width, levels = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    q = normal(batch, heads, tokens, width)
    k = [normal(batch, heads, keys, width) for _ in range(levels)]
    v = [normal(batch, heads, keys, width) for _ in range(levels)]
    gate = normal(batch, tokens, heads, levels) if gated else None
    mask = torch.rand(batch, keys, generator=generator) < 0.6 if masked else None
    if mask is not None and batch > 1:
        mask[0] = False
    return q, k, v, gate, mask
