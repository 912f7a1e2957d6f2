"""The C++ kernel against the formula in float64, its dropout, its determinism, and what happens without a compiler."""

import itertools
import logging
import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

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
from tests.spawn import run_alone, run_ranks
from unimo3.kernels.cross_layer_attention import cross_layer_attention, native
from unimo3.kernels.cross_layer_attention.dropout import draw_bits

# B H T V d S: one and many of each, blocks of 64 queries filled, cut and passed, keys beyond a cache line.
SHAPES = [
    (1, 1, 1, 1, 16, 1),
    (2, 3, 5, 7, 16, 3),
    (3, 2, 33, 37, 32, 4),
    (2, 4, 37, 32, 64, 6),
    (1, 2, 64, 17, 48, 2),
    (2, 1, 130, 70, 96, 7),
    (1, 1, 200, 300, 128, 2),
]


def attend(q, levels, gate, mask, dropout_p=0.0):
    return cross_layer_attention(q, levels, gate, mask, "native", dropout_p)


@pytest.mark.parametrize(("shape", "masked", "gated"), itertools.product(SHAPES, (False, True), (False, True)))
def test_output_and_every_gradient_equal_the_formula(shape, masked, gated, nan_filled):
    q, levels, gate, mask = draw(shape, masked, gated, dtype=torch.float32)
    assert_close_to_formula(q, levels, gate, mask, attend(q, levels, gate, mask))


def test_inputs_may_be_views_of_any_stride():
    q, levels, gate, mask = draw((2, 3, 9, 11, 32, 2), masked=True, gated=True, dtype=torch.float32)
    q, levels = strided(q), [transposed(levels[0]), unaligned(strided(levels[1]))]
    wide_gate = torch.stack([gate.detach()] * 2, dim=-1)
    gate = wide_gate[..., 0].requires_grad_()
    assert_close_to_formula(q, levels, gate, mask, attend(q, levels, gate, mask))


@pytest.mark.parametrize("lengths", [(5, 40, 17), (0, 40, 17)])
def test_levels_may_differ_in_length_and_in_what_is_readable(lengths, nan_filled):
    q, levels, gate, masks = draw_uneven(lengths, torch.float32)
    assert_close_to_formula(q, levels, gate, masks, attend(q, levels, gate, masks))


@pytest.mark.parametrize("shape", [(0, 2, 3, 5, 16, 2), (2, 2, 0, 5, 16, 2), (2, 2, 3, 0, 16, 2)])
def test_no_keys_or_no_queries_give_zeros(shape, nan_filled):
    q, levels, gate, mask = draw(shape, masked=False, gated=True, dtype=torch.float32)
    out = attend(q, levels, gate, mask)
    assert torch.equal(out, torch.zeros_like(q))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in torch.autograd.grad(out.sum(), [q, *levels]))


def test_large_scores_stay_finite():
    q, levels, gate, mask = draw((2, 2, 20, 9, 32, 2), masked=False, gated=True, dtype=torch.float32)
    q = (q * 300).detach().requires_grad_()
    out = attend(q, levels, gate, mask)
    exact = written_out(doubled(q), [doubled(x) for x in levels], doubled(gate), None)
    torch.testing.assert_close(out.double(), exact, atol=1e-3, rtol=1e-3)
    assert all(grad.isfinite().all() for grad in gradients(out, [q, *levels, gate]))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_values_that_are_not_numbers_propagate(name):
    q, levels, gate, mask = draw((1, 1, 4, 5, 16, 2), masked=False, gated=True, dtype=torch.float32)
    with torch.no_grad():
        {"q": q, "k": levels[0][:, :, 0], "v": levels[1][:, :, 1]}[name][0, 2, 0, 3] = torch.nan
    assert attend(q, levels, gate, mask)[0, 2, 0].isnan().any()


@pytest.mark.parametrize("levels", [1, 4])
def test_dropout_drops_a_key_at_all_levels_alike_forward_and_backward(levels):
    assert_dropout_is_the_formulas(
        attend, draw((2, 3, 70, 21, 32, levels), masked=True, gated=True, dtype=torch.float32)
    )


def test_bits_do_not_depend_on_threads_or_on_the_run():
    q, levels, gate, mask = draw((3, 4, 70, 33, 32, 3), masked=True, gated=True, dtype=torch.float32)
    inputs = [q, *levels, gate]
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            out = attend(q, levels, gate, mask, 0.2)
            runs.append([out, *gradients(out, inputs)])
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_one_hot_gates_give_that_levels_bits():
    q, levels, gate, mask = draw((2, 2, 5, 7, 16, 3), masked=True, gated=True, dtype=torch.float32)
    for level, p in itertools.product((0, 2), (0.0, 0.3)):
        one_hot = torch.zeros_like(gate)
        one_hot[..., level] = 1
        torch.manual_seed(1)
        out = attend(q, levels, one_hot, mask, p)
        torch.manual_seed(1)
        assert torch.equal(out, attend(q, [levels[level]], None, mask, p))


def test_activation_checkpointing_gives_the_same_bits():
    q, levels, gate, mask = draw((2, 2, 9, 8, 16, 2), masked=True, gated=True, dtype=torch.float32)
    runs = []
    for run in (attend, lambda *args: checkpoint(attend, *args, use_reentrant=False)):
        torch.manual_seed(4)
        out = run(q, levels, gate, mask, 0.3)
        runs.append([out, *gradients(out, [q, *levels, gate])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_tracing_a_step_records_one_operator(subtests):
    q, levels, gate, mask = draw((2, 2, 9, 8, 16, 2), masked=True, gated=True, dtype=torch.float32)
    expected = attend(q, levels, gate, mask)

    fixed = [x.detach() for x in levels]

    def run(q, gate):
        return attend(q, fixed, gate, mask)

    with subtests.test("opcheck"):
        bits = draw_bits(torch.tensor([7]), 2, 2, 9, 8, 0.25)
        operators = torch.ops.unimo3
        torch.library.opcheck(operators.cross_layer_attention_native.default, (q, levels, gate, [mask], bits, 0.25))
        torch.library.opcheck(
            operators.cross_layer_attention_native_dropout.default, (torch.tensor([7]), 2, 2, 9, 8, 0.25)
        )
    with subtests.test("fake tensors"), FakeTensorMode():
        fake, level = torch.empty(2, 9, 2, 16), torch.empty(2, 5, 2, 2, 16)
        out = cross_layer_attention(fake, [level] * 2, torch.empty(2, 9, 2, 2), dropout_p=0.1)
        assert out.shape == (2, 9, 2, 16)
    with subtests.test("make_fx"):
        assert torch.equal(make_fx(run)(q, gate)(q, gate), expected)
    with subtests.test("jit.trace"):
        assert torch.equal(torch.jit.trace(run, (q, gate))(q, gate), expected)
    with subtests.test("compile"):
        compiled = torch.compile(lambda q, gate: cross_layer_attention(q, levels, gate, mask), backend="aot_eager")
        torch.testing.assert_close(compiled(q, gate), expected)
    with subtests.test("vmap takes the reference"):
        each = torch.vmap(lambda one: cross_layer_attention(one, levels, gate, mask))(torch.stack([q, 2 * q]))
        torch.testing.assert_close(each[0], expected)
    with subtests.test("operations are counted"):
        counted = []
        for impl in ("native", "reference"):
            with FlopCounterMode(display=False) as counter:
                out = cross_layer_attention(q, levels, gate, mask, impl=impl)
                forward = counter.get_total_flops()
                out.sum().backward()
            counted.append((forward, counter.get_total_flops() - forward))
        (forward, backward), plain = counted
        assert (forward, backward) == (plain[0], plain[1] + forward / 2)  # the scores are made again


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 16), (torch.bfloat16, 16), (torch.float32, 24)])
def test_an_unsupported_call_is_an_error_or_falls_back_to_the_reference(dtype, width):
    q, levels, gate, mask = draw((2, 2, 3, 5, width, 2), masked=True, gated=True, dtype=dtype)
    with pytest.raises(ValueError, match=r"impl: 'native' with q of .* a multiple of 16"):
        attend(q, levels, gate, mask)
    expected = cross_layer_attention(q, levels, gate, mask, impl="reference")
    assert torch.equal(cross_layer_attention(q, levels, gate, mask), expected)


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.integration
@pytest.mark.parametrize(
    "compiler",
    [
        "no-such-compiler",
        "false",
        "sh -c 'echo broken compiler >&2; exit 1'",
        "g++ 'unclosed",
        "printf '\\351\\n'",  # prints its version in Latin-1, and builds nothing
        "no home",
    ],
)
def test_a_failed_build_falls_back_to_the_reference_with_a_warning(compiler, monkeypatch, tmp_path, caplog):
    if compiler == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(native.Path, "home", no_home)
    else:
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        q, levels, gate, mask = draw((2, 2, 3, 5, 16, 2), masked=True, gated=True, dtype=torch.float32)
        with caplog.at_level(logging.WARNING):
            outputs = [cross_layer_attention(q, levels, gate, mask) for _ in range(2)]
    finally:
        native.library.cache_clear()
    assert torch.equal(outputs[0], cross_layer_attention(q, levels, gate, mask, impl="reference"))
    assert len(caplog.records) == 1
    assert "its kernel was not built with" in caplog.text
    assert list(tmp_path.rglob("*.so")) == []


def path_of_build(cache):
    os.environ["XDG_CACHE_HOME"] = str(cache)
    native.library.cache_clear()
    return native.library()._name


@pytest.mark.integration
def test_processes_that_build_at_once_use_one_build(tmp_path):
    names = set(run_ranks(2, path_of_build, tmp_path))
    (built,) = tmp_path.rglob("*.so")
    assert names == {str(built)}
    modified = built.stat().st_mtime_ns
    assert run_alone(path_of_build, tmp_path) == str(built)
    assert built.stat().st_mtime_ns == modified
