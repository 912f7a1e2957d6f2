"""The reference against attention written out, in float64, over odd shapes and masks."""

import itertools

import pytest
import torch

from tests.kernels.formula import assert_close_to_formula, draw, draw_uneven, written_out
from unimo3.kernels.cross_layer_attention import cross_layer_attention

SHAPES = [(1, 1, 1, 1, 4, 1), (2, 3, 5, 7, 4, 3), (3, 2, 11, 2, 8, 4), (2, 1, 3, 13, 4, 7)]  # B H T V d S


@pytest.mark.parametrize(("shape", "masked", "gated"), itertools.product(SHAPES, (False, True), (False, True)))
def test_output_and_every_gradient_equal_the_written_out_formula(shape, masked, gated):
    q, k, v, gate, mask = draw(shape, masked, gated)
    inputs = [q, *k, *v, *([gate] if gated else [])]
    expected = written_out(q, k, v, gate, mask)
    actual = cross_layer_attention(q, k, v, gate, mask)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    actual_grads = torch.autograd.grad((actual * weight).sum(), inputs)
    for one, other in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("num_levels", [1, 3])
def test_a_sample_without_any_key_gives_zeros_and_no_gradient(num_levels):
    q, k, v, gate, mask = draw((2, 2, 3, 5, 4, num_levels), masked=True, gated=True)
    out = cross_layer_attention(q, k, v, gate, mask)
    out.sum().backward()
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(q.grad[0], torch.zeros_like(q.grad[0]))
    assert torch.isfinite(q.grad).all()


FITTING = draw((2, 2, 3, 5, 4, 2), masked=True, gated=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"q": FITTING[0][0]}, r"^q: torch.float64 of shape \(2, 3, 4\); floating point \[B, H, T, d\] is needed"),
        ({"q": FITTING[0].long()}, r"^q: torch.int64 of shape .*; floating point"),
        ({"k": []}, r"^k and v: 0 and 2 levels given"),
        ({"v": FITTING[2][:1]}, r"^k and v: 2 and 1 levels given"),
        ({"k": [FITTING[1][0], FITTING[1][1][:1]]}, r"^k\[1\]: shape \(1, 2, 5, 4\); .*\(2, 2, 5, 4\) is needed"),
        ({"v": [FITTING[2][0], FITTING[2][1][:, :, :2]]}, r"^v\[1\]: shape .*k of the same level \(2, 2, 5, 4\)"),
        ({"k": [FITTING[1][0], FITTING[1][1][0]]}, r"^k\[1\]: shape \(2, 5, 4\); .*\(2, 2, V, 4\) is needed"),
        ({"k": [FITTING[1][0], FITTING[1][1].float()]}, r"^k\[1\]: torch.float32 on cpu; q's torch.float64 on cpu"),
        ({"v": [x.to("meta") for x in FITTING[2]]}, r"^v\[0\]: torch.float64 on meta; q's torch.float64 on cpu"),
        ({"gate": FITTING[3][..., :1]}, r"^gate: shape \(2, 3, 2, 1\); \(2, 3, 2, 2\) is needed"),
        ({"gate": FITTING[3].int()}, r"^gate: torch.int32 on cpu; floating point on cpu is needed"),
        ({"key_padding_mask": FITTING[4][:, :2]}, r"^key_padding_mask: shape \(2, 2\); \(2, 5\) is needed for level 0"),
        ({"key_padding_mask": FITTING[4].int()}, r"^key_padding_mask: torch.int32 on cpu; torch.bool on cpu is needed"),
        ({"key_padding_mask": [FITTING[4]]}, r"^key_padding_mask: 1 given; one for all levels, or one for each of 2"),
        ({"dropout_p": 1.0}, r"^dropout_p: 1.0; a probability"),
        ({"impl": "fast"}, r"^impl: 'fast'; one of triton, native, reference is supported"),
        ({"impl": "triton"}, r"^impl: 'triton' with q of torch.float64 on cpu, head width 4; needs .* 32, 64, 96, 128"),
        ({"impl": "native"}, r"^impl: 'native' with q of torch.float64 on cpu, head width 4; needs float32 .* of 16"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, named):
    arguments = dict(zip(("q", "k", "v", "gate", "key_padding_mask"), FITTING, strict=True))
    with pytest.raises(ValueError, match=named):
        cross_layer_attention(**(arguments | changes))


def test_levels_of_different_lengths_equal_the_formula():
    q, k, v, gate, masks = draw_uneven((5, 40, 17), torch.float64)
    actual = cross_layer_attention(q, k, v, gate, masks)
    assert_close_to_formula(q, k, v, gate, masks, actual, tolerance=1e-12)


def test_the_reference_passes_gradcheck():
    q, k, v, gate, mask = draw((2, 1, 3, 4, 4, 2), masked=True, gated=True)

    def attend(q, gate, *levels):
        return cross_layer_attention(q, levels[:2], levels[2:], gate, mask, impl="reference")

    assert torch.autograd.gradcheck(attend, (q, gate, *k, *v))


def test_a_dropped_key_is_dropped_at_every_level_and_the_mean_stays():
    q, k, _, gate, _ = draw((2, 2, 3, 6, 6, 3), masked=False, gated=True)
    # Values are one-hot vectors of the keys' indices, so that the result is the mixed attention weights.
    one_hot = torch.eye(6, dtype=torch.float64).expand(2, 2, 6, 6)
    torch.manual_seed(0)
    draws = torch.stack([cross_layer_attention(q, k, [one_hot] * 3, gate, None, dropout_p=0.5) for _ in range(4000)])
    full = cross_layer_attention(q, k, [one_hot] * 3, gate)
    retained = draws.abs() > 1e-12
    assert retained.double().mean().item() == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(draws[retained], (2 * full).expand_as(draws)[retained])


@pytest.mark.parametrize("level", [0, 2])
def test_one_hot_gates_give_that_levels_bits(level):
    q, k, v, gate, mask = draw((2, 2, 5, 7, 8, 3), masked=True, gated=True)
    one_hot = torch.zeros_like(gate)
    one_hot[..., level] = 1
    for p in (0.0, 0.3):
        torch.manual_seed(1)
        actual = cross_layer_attention(q, k, v, one_hot, mask, dropout_p=p)
        torch.manual_seed(1)
        assert torch.equal(actual, cross_layer_attention(q, [k[level]], [v[level]], None, mask, dropout_p=p))


def test_half_types_follow_float32():
    q, k, v, gate, mask = draw((2, 2, 5, 7, 8, 3), masked=True, gated=True)
    expected = cross_layer_attention(q, k, v, gate, mask)
    half = cross_layer_attention(q.bfloat16(), [x.bfloat16() for x in k], [x.bfloat16() for x in v], gate.float(), mask)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, atol=0.05, rtol=0.05)
