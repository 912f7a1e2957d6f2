"""The reference against attention written out, in float64, over odd shapes and masks."""

import itertools

import pytest
import torch

from tests.kernels.formula import draw, written_out
from unimo3.kernels.cross_layer_attention import cross_layer_attention

SHAPES = [(1, 1, 1, 1, 4, 1), (2, 3, 5, 7, 4, 3), (3, 2, 11, 2, 8, 4), (2, 1, 3, 13, 4, 7)]  # B H T V d S


@pytest.mark.parametrize(("shape", "masked", "gated"), itertools.product(SHAPES, (False, True), (False, True)))
def test_output_and_every_gradient_equal_the_written_out_formula(shape, masked, gated):
    q, k, v, gate, mask = draw(shape, masked, gated)
    inputs = [q, *k, *v, *([gate] if gated else [])]
    expected = written_out(q, k, v, gate, mask)
    found = cross_layer_attention(q, k, v, gate, mask)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    found_grads = torch.autograd.grad((found * weight).sum(), inputs)
    for one, other in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("num_levels", [1, 3])
def test_a_sample_without_any_key_gives_zeros_and_no_gradient(num_levels):
    q, k, v, gate, mask = draw((2, 2, 3, 5, 4, num_levels), masked=True, gated=True)
    out = cross_layer_attention(q, k, v, gate, mask)
    out.sum().backward()
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(q.grad[0], torch.zeros_like(q.grad[0]))
    assert torch.isfinite(q.grad).all()


def test_misfitting_shapes_are_named():
    q, k, v, gate, mask = draw((2, 2, 3, 5, 4, 2), masked=True, gated=True)
    with pytest.raises(ValueError, match=r"gate: shape .*; \(2, 3, 2, 2\) is needed"):
        cross_layer_attention(q, k, v, gate[..., :1], mask)
    with pytest.raises(ValueError, match=r"key_padding_mask: shape"):
        cross_layer_attention(q, k, v, gate, mask[:, :2])
    with pytest.raises(ValueError, match=r"v\[1\]: shape"):
        cross_layer_attention(q, k, [v[0], v[1][:, :, :2]], gate, mask)
    with pytest.raises(ValueError, match="2 and 1 levels"):
        cross_layer_attention(q, k, v[:1], gate, mask)


def test_a_dropped_key_is_dropped_at_every_level_and_the_mean_is_kept():
    q, k, _, gate, _ = draw((2, 2, 3, 6, 6, 3), masked=False, gated=True)
    # Values that are the keys' places, so that the result is the mixed attention weights themselves.
    places = torch.eye(6, dtype=torch.float64).expand(2, 2, 6, 6)
    torch.manual_seed(0)
    draws = torch.stack([cross_layer_attention(q, k, [places] * 3, gate, None, dropout_p=0.5) for _ in range(4000)])
    whole = cross_layer_attention(q, k, [places] * 3, gate)
    kept = draws.abs() > 1e-12
    assert kept.double().mean().item() == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(draws[kept], (2 * whole).expand_as(draws)[kept])


def test_types_that_differ_and_unknown_implementations_are_named():
    q, k, v, gate, mask = draw((2, 2, 3, 5, 4, 2), masked=True, gated=True)
    with pytest.raises(ValueError, match=r"k\[1\]: torch.float32 on cpu; q's torch.float64 on cpu is needed"):
        cross_layer_attention(q, [k[0], k[1].float()], v, gate, mask)
    with pytest.raises(ValueError, match="impl: 'fast'; one of native, reference is served"):
        cross_layer_attention(q, k, v, gate, mask, impl="fast")


@pytest.mark.parametrize("level", [0, 2])
def test_one_hot_gates_give_that_levels_bits(level):
    q, k, v, gate, mask = draw((2, 2, 5, 7, 8, 3), masked=True, gated=True)
    one_hot = torch.zeros_like(gate)
    one_hot[..., level] = 1
    for p in (0.0, 0.3):
        torch.manual_seed(1)
        found = cross_layer_attention(q, k, v, one_hot, mask, p)
        torch.manual_seed(1)
        assert torch.equal(found, cross_layer_attention(q, [k[level]], [v[level]], None, mask, p))


def test_half_types_follow_float32():
    q, k, v, gate, mask = draw((2, 2, 5, 7, 8, 3), masked=True, gated=True)
    expected = cross_layer_attention(q, k, v, gate, mask)
    half = cross_layer_attention(q.bfloat16(), [x.bfloat16() for x in k], [x.bfloat16() for x in v], gate.float(), mask)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, atol=0.05, rtol=0.05)
