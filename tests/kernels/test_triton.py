"""The Triton kernels against the formula in float64, run by triton's interpreter where there is no GPU."""

import itertools
import logging
import random

import numpy as np
import pytest
import torch
import triton.language as tl
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.kernels.formula import (
    assert_close_to_formula,
    assert_dropout_is_the_formulas,
    doubled,
    draw,
    draw_uneven,
    gradients,
    strided,
    transposed,
    unaligned,
    written_out,
)
from unimo3.kernels.cross_layer_attention import blocks, cross_layer_attention, launch, trial
from unimo3.kernels.cross_layer_attention.blocks import (
    FLOAT32,
    HALF,
    WITH_DROPOUT,
    Blocks,
    backward_kernels,
    entry,
    fitted,
    forward_kernel,
)
from unimo3.kernels.cross_layer_attention.trial import tried, triton_works

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = {torch.float32: 5e-6, torch.float16: 4e-3}


def attend(q, levels, gate, mask, dropout_p=0.0):
    return cross_layer_attention(q, levels, gate, mask, "triton", dropout_p)


def on_device(drawn):
    """The same values as leaves on the device; the gate in float32, as the model's is."""
    q, levels, gate, mask = drawn

    def leaf(x):
        return x.detach().to(DEVICE).requires_grad_()

    mask = [m.to(DEVICE) for m in mask] if isinstance(mask, list) else None if mask is None else mask.to(DEVICE)
    return leaf(q), [leaf(x) for x in levels], None if gate is None else leaf(gate).float(), mask


def drawn_shapes(number):
    """(B, H, T, V, d, S), masked, gated, strided: sizes that are multiples of nothing, S from 1 to 7.

    Of three samples one has no readable key, one some and one all.
    """
    chooser = random.Random(4)
    for index in range(number):
        tokens, keys = chooser.choice([1, 5, 17, 33, 50, 71]), chooser.choice([1, 7, 31, 37, 65, 90])
        width, levels = (32, 64, 96, 128)[index % 4], index % 7 + 1
        samples, heads = 3 if index % 3 else chooser.choice([1, 2]), chooser.choice([1, 3])
        # Each program takes the interpreter long; several heads meet several blocks where there are few levels.
        if levels > 2 and levels * tokens * keys > 2500:
            heads = 1
        yield (
            (samples, heads, tokens, keys, width, levels),
            index % 3 != 0,
            index % 5 != 0,
            index % 4 == 1,
        )


# Samples, heads, levels and blocks of both kinds.
SEVERAL_OF_ALL = (2, 3, 40, 50, 32, 3), True, True, False


@pytest.mark.parametrize(("shape", "masked", "gated", "has_strides"), [*drawn_shapes(42), SEVERAL_OF_ALL])
def test_output_and_every_gradient_equal_the_formula(shape, masked, gated, has_strides, nan_filled):
    _, _, tokens, keys, _, num_levels = shape
    # The interpreter takes long for large shapes: each has one of the two types, and some have float16.
    is_large = num_levels * tokens * keys > 1000 and shape != SEVERAL_OF_ALL[0]
    for dtype in [list(TYPES)[num_levels % 2]] if is_large else TYPES:
        tolerance = TYPES[dtype]
        q, levels, gate, mask = on_device(draw(shape, masked, gated, dtype=dtype))
        if mask is not None:
            mask[-1] = True
        if has_strides:
            q, levels = strided(q), [(transposed, strided, unaligned)[i % 3](x) for i, x in enumerate(levels)]
        assert_close_to_formula(q, levels, gate, mask, attend(q, levels, gate, mask), tolerance=tolerance)


@pytest.fixture
def exact_bfloat16(monkeypatch):
    """The interpreter's product of bfloat16 multiplies the bits as integers (triton 3.9): here their values."""
    if DEVICE == "cuda":
        return
    product = InterpreterBuilder.create_dot

    def values(handle):
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        pair = [values(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return product(self, *pair, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


# Every kernel: text reads image, image reads text, and lengths of a multiple of blocks and a half.
@pytest.mark.parametrize("sizes", [(50, 192), (192, 50), (192, 192)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sharp_rows_are_as_exact_as_plain_operations(sizes, dtype, exact_bfloat16, nan_filled):
    q, levels, gate, mask = draw((1, 1, *sizes, 64, 2), masked=False, gated=True, dtype=dtype)
    # Scores of 16 times the usual size: most rows are all but one-hot.
    q, levels, gate, mask = on_device(((16 * q).detach(), levels, gate, mask))
    results = []
    for impl in ("triton", "reference"):
        out = cross_layer_attention(q, levels, gate, mask, impl)
        results.append([out.detach(), *gradients(out, [q, *levels, gate])])
    leaves = [doubled(x) for x in (q, *levels, gate)]
    exact = written_out(leaves[0], leaves[1:-1], leaves[-1], None)
    for ours, plain, right in zip(*results, [exact, *gradients(exact, leaves)], strict=True):
        errors = [(one.double() - right).norm() / right.norm() for one in (ours, plain)]
        assert errors[0] <= 1.5 * errors[1] + 1e-6


def test_levels_may_differ_in_length_and_in_what_is_readable(nan_filled):
    q, levels, gate, masks = on_device(draw_uneven((5, 40, 17), torch.float32))
    assert_close_to_formula(q, levels, gate, masks, attend(q, levels, gate, masks))


def test_inputs_may_be_views_of_any_stride(nan_filled):
    q, levels, gate, mask = on_device(draw((2, 3, 9, 11, 32, 2), masked=True, gated=True, dtype=torch.float32))
    q, levels = strided(q), [transposed(levels[0]), unaligned(levels[1])]
    gate = torch.stack([gate.detach()] * 2, dim=-1)[..., 0].requires_grad_()
    mask = torch.stack([mask] * 2, dim=-1)[..., 0]
    assert_close_to_formula(q, levels, gate, mask, attend(q, levels, gate, mask))


def test_a_level_without_a_readable_key_adds_zeros():
    q, levels, gate, masks = on_device(draw_uneven((6, 6), torch.float32))
    masks[1][:] = True
    alone = attend(q, levels[1:], gate[..., 1:], masks[1:])
    torch.testing.assert_close(attend(q, levels, gate, masks)[0], alone[0])


@pytest.mark.parametrize(("masked", "gated"), itertools.product((False, True), repeat=2))
def test_torchs_attention_may_take_a_call_with_one_level(masked, gated, monkeypatch):
    monkeypatch.setattr(blocks, "ONE_LEVEL_BY_TORCH", True)
    monkeypatch.setattr(launch, "attend", None)
    q, levels, gate, mask = on_device(draw((2, 3, 9, 11, 32, 1), masked, gated, dtype=torch.float32))
    assert_close_to_formula(q, levels, gate, mask, attend(q, levels, gate, mask))
    assert attend(q, levels, gate, mask, 0.3).isfinite().all()


# In float16 and at width 32: each kernel of the table in one of them.
LENGTHS_OF_ALL = {
    (35, 21): ("forward_short", "backward_fused"),
    (35, 70): ("forward", "backward_fused"),
    (70, 21): ("forward_short", "backward_query_short", "backward_key"),
    (70, 70): ("forward", "backward_query", "backward_key"),
}


@pytest.mark.parametrize("levels", [1, 3])
def test_dropout_drops_a_key_at_all_levels_alike_forward_and_backward(levels):
    assert_dropout_is_the_formulas(
        attend, on_device(draw((2, 2, 35, 21, 32, levels), masked=True, gated=True, dtype=torch.float32))
    )


@pytest.mark.parametrize("sizes", LENGTHS_OF_ALL)
def test_every_kernel_drops_by_the_bits_and_repeats_itself(sizes, nan_filled):
    q, levels, gate, mask = on_device(draw((2, 2, *sizes, 32, 2), masked=True, gated=True, dtype=torch.float16))
    lengths = (sizes[1],) * len(levels)
    if DEVICE == "cpu":  # a GPU's table may choose others
        assert (forward_kernel(q, lengths, 1), *backward_kernels(q, lengths, 1)) == LENGTHS_OF_ALL[sizes]
    assert_dropout_is_the_formulas(attend, (q, levels, gate, mask), tolerance=TYPES[torch.float16])
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        out = attend(q, levels, gate, mask, 0.3)
        runs.append([out, *gradients(out, [q, *levels, gate])])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_activation_checkpointing_gives_the_same_bits():
    q, levels, gate, mask = on_device(draw((2, 2, 19, 33, 32, 2), masked=True, gated=True, dtype=torch.float32))
    results = []
    for run in (attend, lambda *args: checkpoint(attend, *args, use_reentrant=False)):
        torch.manual_seed(4)
        out = run(q, levels, gate, mask, 0.3)
        results.append([out, *gradients(out, [q, *levels, gate])])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.skipif(DEVICE != "cuda", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_cuda_graph_runs_both_passes_again(dropout_p):
    q, levels, gate, mask = on_device(draw((2, 2, 35, 70, 32, 2), masked=True, gated=True, dtype=torch.float16))

    def both():
        out = attend(q, levels, gate, mask, dropout_p)
        return [out, *gradients(out, [q, *levels, gate])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = both()  # compiled and, by `auto`, tried before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    runs = []
    for _ in range(2):
        graph.replay()
        runs.append([x.clone() for x in captured])
    others = [runs[1]] if dropout_p else [runs[1], expected]
    same = [all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True)) for other in others]
    assert all(x.isfinite().all() for x in runs[0])
    assert same == ([False] if dropout_p else [True, True])


# Short queries and long ones.
@pytest.mark.parametrize("tokens", [19, 70])
def test_one_of_several_levels_may_have_no_key(tokens, nan_filled):
    q, levels, gate, masks = on_device(draw_uneven((0, 40, 17), torch.float32, tokens=tokens))
    assert_close_to_formula(q, levels, gate, masks, attend(q, levels, gate, masks))


@pytest.mark.parametrize("shape", [(0, 2, 3, 5, 32, 2), (2, 2, 0, 5, 32, 2), (2, 2, 3, 0, 32, 2)])
def test_no_keys_or_no_queries_give_zeros(shape, nan_filled):
    q, levels, gate, mask = on_device(draw(shape, masked=False, gated=True, dtype=torch.float32))
    out = attend(q, levels, gate, mask)
    assert torch.equal(out, torch.zeros_like(q))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in torch.autograd.grad(out.sum(), [q, *levels]))


@pytest.mark.parametrize(("masked", "gated"), itertools.product((False, True), repeat=2))
def test_the_operator_is_registered_as_torch_wants_it(masked, gated):
    q, levels, gate, mask = on_device(draw((2, 1, 5, 7, 32, 2), masked, gated, dtype=torch.float32))
    masks = [] if mask is None else [mask]
    bits = launch.draw_bits(torch.tensor([7], device=DEVICE), 2, 1, 5, 7, 0.25)
    attend(q, levels, gate, mask)  # imports it
    torch.library.opcheck(torch.ops.unimo3.cross_layer_attention_triton.default, (q, levels, gate, masks, bits, 0.25))


def test_compiled_code_calls_it_and_gives_the_same_values():
    q, levels, gate, mask = on_device(draw((1, 2, 5, 7, 32, 2), masked=True, gated=True, dtype=torch.float32))

    def block(q, gate):
        return attend(q * 2, levels, gate.softmax(-1), mask).square()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected, actual = block(q, gate), compiled(q, gate)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(gradients(actual, [q, gate, *levels]), gradients(expected, [q, gate, *levels]), strict=True):
        torch.testing.assert_close(one, other)


def test_the_kernel_accepts_the_dtypes_of_autocast():
    projection = torch.nn.Linear(64, 64, device=DEVICE)
    x = torch.randn(2, 9, 64, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        heads = projection(x).unflatten(-1, (2, 32))
        out = attend(heads, [torch.stack([heads, heads], 2)] * 2, None, None)
    assert out.dtype == torch.float16
    out.float().sum().backward()
    assert projection.weight.grad.isfinite().all()


def test_the_trial_passes_and_leaves_generators_alone(caplog):
    caplog.set_level(logging.INFO)
    before = torch.get_rng_state()
    tried.cache_clear()
    assert triton_works(torch.device(DEVICE), torch.float32, 32)
    assert torch.equal(torch.get_rng_state(), before)
    assert "passed their trial with torch.float32, width 32" in caplog.text


@pytest.mark.skipif(DEVICE == "cuda", reason="bfloat16 is wrong in triton's interpreter alone")
def test_the_trial_detects_wrong_results_and_failures(caplog):
    tried.cache_clear()
    assert not triton_works(torch.device("cpu"), torch.bfloat16, 32)
    assert "of its largest value off" in caplog.text
    assert not triton_works(torch.device("cpu"), torch.float32, 0)
    assert "they do not run" in caplog.text


@pytest.fixture
def short_trial(monkeypatch):
    """A trial of one pair of lengths, where its result is not what is tested."""
    monkeypatch.setattr(trial, "_LENGTHS", ((9, (20,)),))
    tried.cache_clear()
    yield
    tried.cache_clear()


def test_a_trial_inside_a_checkpointed_layer_is_not_taken_for_a_part_of_it(short_trial):
    q, levels, gate, mask = on_device(draw((1, 2, 9, 11, 32, 2), masked=True, gated=True, dtype=torch.float32))

    def layer(*inputs):
        assert triton_works(inputs[0].device, torch.float32, 32)
        return attend(*inputs)

    out = checkpoint(layer, q, levels, gate, mask, use_reentrant=False)
    expected = attend(q, levels, gate, mask)
    for actual, wanted in zip(gradients(out, [q, *levels]), gradients(expected, [q, *levels]), strict=True):
        assert torch.equal(actual, wanted)


def test_the_trial_is_a_constant_to_torch_compile(short_trial):
    def double_if_it_works(x):
        return 2 * x if triton_works(x.device, x.dtype, 32) else x

    x = torch.ones(3, device=DEVICE)
    assert torch.equal(torch.compile(double_if_it_works, backend="eager", fullgraph=True)(x), 2 * x)


def test_blocks_timed_on_the_machine_compute_the_same(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    inputs = on_device(draw((1, 1, 9, 11, 32, 2), masked=True, gated=True, dtype=torch.float32))
    monkeypatch.setenv("UNIMO3_AUTOTUNE", "1")
    assert_close_to_formula(*inputs, attend(*inputs))
    # One line a kernel, at the first call alone.
    lines = [record.message for record in caplog.records if "num_warps" in record.message]
    assert [line.split(":")[0] for line in lines] == ["forward_short", "backward_fused"]
    attend(*inputs)
    assert len([record for record in caplog.records if "num_warps" in record.message]) == 2


def test_the_table_chooses_kernels_and_blocks_by_lengths():
    def kernels(queries, lengths, masks=1, dtype=torch.float16):
        q = torch.empty(1, queries, 1, 64, dtype=dtype, device=DEVICE)
        return forward_kernel(q, lengths, masks), *backward_kernels(q, lengths, masks)

    assert kernels(50, (325, 325)) == ("forward", "backward_fused")
    assert kernels(325, (50, 50)) == ("forward_short", "backward_query_short", "backward_key")
    assert kernels(325, (325,)) == ("forward", "backward_query", "backward_key")
    assert kernels(50, (50, 50)) == ("forward_short", "backward_fused")
    # Short keys are one block, whose length and mask all levels share.
    assert kernels(325, (50, 40)) == kernels(325, (50, 50), masks=2) == ("forward", "backward_query", "backward_key")
    # Blocks of float32 are smaller.
    assert kernels(50, (325,), dtype=torch.float32) == ("forward", "backward_query", "backward_key")
    assert kernels(325, (0,))[-1] == "backward_query_short"  # there is no key to differentiate


def test_on_hopper_two_groups_of_warps_never_compute_the_same_rows():
    tables = [*HALF[90].values(), *WITH_DROPOUT[90].values()]
    entries = [one for by_kernel in tables for one in by_kernel.values()]
    assert all(one.warps < 8 or one.queries >= 128 for one in entries)


def test_blocks_are_no_larger_than_lengths_need():
    largest = Blocks(64, 64, 4, 2)
    assert fitted(largest, 20, 325) == Blocks(32, 64, 4, 2)
    assert fitted(largest, 325, 17) == Blocks(64, 32, 4, 2)
    assert fitted(largest, 3, 0) == Blocks(16, 16, 4, 2)
    # Heads of 96 are padded to 128; float32 has separate entries.
    assert entry("backward_query", torch.float16, 96, 90) == entry("backward_query", torch.float16, 128, 90)
    assert entry("forward", torch.float32, 128, 80) != entry("forward", torch.float16, 128, 80)


def test_entries_of_dropout_cover_what_the_others_cover():
    for capability, by_width in WITH_DROPOUT.items():
        for width, by_kernel in by_width.items():
            for kernel, special in by_kernel.items():
                plain = HALF[capability][width][kernel]
                assert entry(kernel, torch.bfloat16, width, capability, dropout=True) == special != plain
                assert entry(kernel, torch.float32, width, capability, dropout=True) == FLOAT32[width][kernel]
                # Lengths choose the kernel, whether or not there is dropout.
                assert special.keys >= plain.keys
                assert special.queries >= plain.queries
