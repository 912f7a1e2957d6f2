"""The operation's formula with explicit loops, and drawn inputs for it."""

import torch


def written_out(q, k, v, gate, mask, kept=None):
    """Level by level; a sample without keys gives zeros. `kept` [B, H, T, V] multiplies every level's weights."""
    out = torch.zeros_like(q)
    for level in range(len(k)):
        scores = q @ k[level].transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
        weights = torch.nan_to_num(scores.softmax(-1))
        if kept is not None:
            weights = weights * kept
        share = 1 / len(k) if gate is None else gate[..., level].transpose(1, 2)[..., None]
        out = out + share * (weights @ v[level])
    return out


def draw(shape, masked, gated, seed=0, dtype=torch.float64):
    """q, k, v, gate, mask of sizes (B, H, T, V, d, S); with `masked` the first sample has no readable key."""
    batch, heads, tokens, keys, width, levels = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    q = normal(batch, heads, tokens, width)
    k = [normal(batch, heads, keys, width) for _ in range(levels)]
    v = [normal(batch, heads, keys, width) for _ in range(levels)]
    gate = normal(batch, tokens, heads, levels) if gated else None
    mask = torch.rand(batch, keys, generator=generator) < 0.6 if masked else None
    if mask is not None:
        mask[0] = False
    return q, k, v, gate, mask
