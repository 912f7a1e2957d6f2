"""The reference against attention written out, in float64, over odd shapes and masks."""

import itertools

import pytest
import torch

from tests.kernels.formula import assert_close_to_formula, draw, draw_uneven, written_out
from unimo3.kernels.cross_layer_attention import cross_layer_attention, interprets_triton, launch, native
from unimo3.kernels.cross_layer_attention.dropout import WORD, draw_bits, num_words, retained_keys

SHAPES = [(1, 1, 1, 1, 4, 1), (2, 3, 5, 7, 4, 3), (3, 2, 11, 2, 8, 4), (2, 1, 3, 13, 4, 7)]  # B H T V d S


@pytest.mark.parametrize(("shape", "masked", "gated"), itertools.product(SHAPES, (False, True), (False, True)))
def test_output_and_every_gradient_equal_the_written_out_formula(shape, masked, gated):
    q, levels, gate, mask = draw(shape, masked, gated)
    inputs = [q, *levels, *([gate] if gated else [])]
    expected = written_out(q, levels, gate, mask)
    actual = cross_layer_attention(q, levels, gate, mask)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    actual_grads = torch.autograd.grad((actual * weight).sum(), inputs)
    for one, other in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("num_levels", [1, 3])
def test_a_sample_without_any_key_gives_zeros_and_no_gradient(num_levels):
    q, levels, gate, mask = draw((2, 2, 3, 5, 4, num_levels), masked=True, gated=True)
    out = cross_layer_attention(q, levels, gate, mask)
    out.sum().backward()
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(q.grad[0], torch.zeros_like(q.grad[0]))
    assert torch.isfinite(q.grad).all()


FITTING = draw((2, 2, 3, 5, 4, 2), masked=True, gated=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"q": FITTING[0][0]}, r"^q: torch.float64 of shape \(3, 2, 4\); floating point \[B, T, H, d\] is needed"),
        ({"q": FITTING[0].long()}, r"^q: torch.int64 of shape .*; floating point"),
        ({"levels": []}, r"^levels: none; a list of one \[B, V, 2, H, d\] tensor a level is needed"),
        ({"levels": FITTING[1][0]}, r"^levels: a Tensor; a list of one"),
        ({"levels": [FITTING[1][0], None]}, r"^levels: is a NoneType; tensors are needed"),
        ({"levels": [FITTING[1][0], FITTING[1][1][:1]]}, r"^levels\[1\]: shape .*\(2, 5, 2, 2, 4\) is needed"),
        ({"levels": [FITTING[1][0], FITTING[1][1][:, :, :1]]}, r"^levels\[1\]: shape .*\(2, 5, 2, 2, 4\) is needed"),
        ({"levels": [FITTING[1][0], FITTING[1][1][0]]}, r"^levels\[1\]: shape \(5, 2, 2, 4\); .*\(2, V, 2, 2, 4\)"),
        ({"levels": [FITTING[1][0], FITTING[1][1].float()]}, r"^levels\[1\]: torch.float32 on cpu; q's torch.float64"),
        (
            {"levels": [x.to("meta") for x in FITTING[1]]},
            r"^levels\[0\]: torch.float64 on meta; q's torch.float64",
        ),
        ({"gate": FITTING[2][..., :1]}, r"^gate: shape \(2, 3, 2, 1\); \(2, 3, 2, 2\) is needed"),
        ({"gate": FITTING[2].int()}, r"^gate: torch.int32 on cpu; floating point on cpu is needed"),
        ({"key_padding_mask": FITTING[3][:, :2]}, r"^key_padding_mask: shape \(2, 2\); \(2, 5\) is needed for level 0"),
        ({"key_padding_mask": FITTING[3].int()}, r"^key_padding_mask: torch.int32 on cpu; torch.bool on cpu is needed"),
        ({"key_padding_mask": [FITTING[3]]}, r"^key_padding_mask: 1 given; one for all levels, or one for each of 2"),
        ({"dropout_p": 1.0}, r"^dropout_p: 1.0; a probability"),
        ({"impl": "fast"}, r"^impl: 'fast'; one of triton, native, reference is supported"),
        ({"impl": "triton"}, r"^impl: 'triton' with q of torch.float64 on cpu, head width 4; needs .* 32, 64, 96, 128"),
        ({"impl": "native"}, r"^impl: 'native' with q of torch.float64 on cpu, head width 4; needs float32 .* of 16"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, named):
    arguments = dict(zip(("q", "levels", "gate", "key_padding_mask"), FITTING, strict=True))
    with pytest.raises(ValueError, match=named):
        cross_layer_attention(**(arguments | changes))


def test_levels_of_different_lengths_equal_the_formula():
    q, levels, gate, masks = draw_uneven((5, 40, 17), torch.float64)
    actual = cross_layer_attention(q, levels, gate, masks)
    assert_close_to_formula(q, levels, gate, masks, actual, tolerance=1e-12)


def test_the_reference_passes_gradcheck():
    q, levels, gate, mask = draw((2, 1, 3, 4, 4, 2), masked=True, gated=True)

    def attend(q, gate, *levels):
        return cross_layer_attention(q, levels, gate, mask, impl="reference")

    assert torch.autograd.gradcheck(attend, (q, gate, *levels))


def test_a_dropped_key_is_dropped_at_every_level_and_the_mean_stays():
    q, levels, gate, _ = draw((2, 2, 3, 6, 6, 3), masked=False, gated=True)
    # Values are one-hot vectors of the keys' indices, so that the result is the mixed attention weights.
    one_hot = torch.eye(6, dtype=torch.float64)[None, :, None].expand(2, 6, 2, 6)
    levels = [torch.stack([level[:, :, 0], one_hot], 2) for level in levels]
    torch.manual_seed(0)
    draws = torch.stack([cross_layer_attention(q, levels, gate, None, dropout_p=0.5) for _ in range(4000)])
    full = cross_layer_attention(q, levels, gate)
    retained = draws.abs() > 1e-12
    assert retained.double().mean().item() == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(draws[retained], (2 * full).expand_as(draws)[retained])


@pytest.mark.parametrize(("keys", "queries"), [(1, 3), (64, 2), (325, 7)])
def test_all_implementations_draw_the_same_bits_from_a_seed(keys, queries):
    sizes = (2, 3, queries, keys, 0.3)
    for seed in (torch.tensor([7]), torch.tensor([2**62 + 12345])):
        expected = draw_bits(seed, *sizes)
        assert torch.equal(native.draw_bits(seed, *sizes), expected)
        if not interprets_triton():
            continue
        drawn = launch.draw_bits(seed, *sizes)
        assert torch.equal(drawn[..., : expected.shape[-1]], expected)
        # Behind them are the same bits by key.
        by_key = retained_keys(drawn[..., expected.shape[-1] :], num_words(keys) * WORD, queries)[:, :, :keys]
        assert torch.equal(by_key.transpose(2, 3), retained_keys(expected, queries, keys))


def test_dropout_keeps_its_rate_and_neighbours_are_independent():
    first, second = (retained_keys(draw_bits(torch.tensor([seed]), 8, 4, 37, 50, 0.1), 37, 50) for seed in (11, 12))
    # Five standard deviations of 59,200 draws.
    assert first.double().mean().item() == pytest.approx(0.9, abs=0.0062)
    assert (first == second).double().mean().item() == pytest.approx(0.82, abs=0.008)
    for axis in range(4):
        means = first.double().mean(dim=[other for other in range(4) if other != axis])
        assert (means - 0.9).abs().max() < 5 * (0.09 * len(means) / first.numel()) ** 0.5
        one, other = (first.narrow(axis, start, first.shape[axis] - 1) for start in (0, 1))
        assert (one == other).double().mean().item() == pytest.approx(0.82, abs=0.01)


@pytest.mark.parametrize("level", [0, 2])
def test_one_hot_gates_give_that_levels_bits(level):
    q, levels, gate, mask = draw((2, 2, 5, 7, 8, 3), masked=True, gated=True)
    one_hot = torch.zeros_like(gate)
    one_hot[..., level] = 1
    for p in (0.0, 0.3):
        torch.manual_seed(1)
        actual = cross_layer_attention(q, levels, one_hot, mask, dropout_p=p)
        torch.manual_seed(1)
        assert torch.equal(actual, cross_layer_attention(q, [levels[level]], None, mask, dropout_p=p))


def test_half_types_follow_float32():
    q, levels, gate, mask = draw((2, 2, 5, 7, 8, 3), masked=True, gated=True)
    expected = cross_layer_attention(q, levels, gate, mask)
    half = cross_layer_attention(q.bfloat16(), [x.bfloat16() for x in levels], gate.float(), mask)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, atol=0.05, rtol=0.05)
