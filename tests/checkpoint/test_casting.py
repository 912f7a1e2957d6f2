import hashlib

import pytest
import torch

from unimo3.checkpoint.casting import Casting, Workspace

TYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("written", TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_casting_in_pieces_counts_what_casting_at_once_shows(stored, written, seed):
    generator = torch.Generator().manual_seed(seed)
    count = 101
    # From zeros over what becomes zero in half precision up to large values, of either sign.
    scale = 10 ** (torch.rand(count, dtype=torch.float64, generator=generator) * 13 - 10)
    values = torch.randn(count, dtype=torch.float64, generator=generator) * scale
    values[:3] = torch.tensor([0.0, -0.0, -1e-9])
    values = values.to(stored)
    limit = torch.finfo(written).max
    casting, space = Casting("name", values.shape, written, written, clamp=True), Workspace(7)
    actual = torch.cat([casting.cast(piece, space).clone() for piece in values.split(7)])
    wide = values.double()
    expected = wide.clamp(-limit, limit).to(stored if stored == torch.float64 else torch.float32).to(written)
    assert actual.dtype == written
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    report = casting.report(casting.digest)
    assert report.num_over_range == int((wide.abs() > limit).sum())
    assert report.num_flushed == int((wide != 0).sum()) - int((expected != 0).sum())
    assert report.largest == wide.abs().max().item()
    assert report.sha256 == hashlib.sha256(expected.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert casting.problem() == ""


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [0, 5, 9])
def test_one_value_that_is_not_finite_in_any_piece_is_an_error(clamp, bad, index):
    values = torch.full((10,), 1e5)
    values[index] = bad
    casting, space = Casting("name", values.shape, torch.float16, torch.float16, clamp), Workspace(4)
    for piece in values.split(4):
        casting.cast(piece, space)
    assert casting.problem().startswith("name: 1 of 10 values are not finite")


def test_a_tensor_saved_in_float32_is_no_error_unless_it_overflows_too():
    for value, problem in ((1e5, ""), (1e300, "name: 1 of 1 values, up to 1e+300, exceed 65504")):
        casting = Casting("name", torch.Size([1]), torch.float16, torch.float32, clamp=False)
        casting.cast(torch.tensor([value], dtype=torch.float64), Workspace(1))
        assert casting.problem().startswith(problem)
        assert bool(casting.problem()) == bool(problem)
        assert casting.report("").num_over_range == 1


def test_tensors_of_integers_are_not_cast():
    values = torch.tensor([2**40, -1])
    casting = Casting("name", values.shape, torch.float16, torch.int64, clamp=True)
    assert casting.cast(values, Workspace(2)) is values
    assert (casting.report("").dtype, casting.report("").largest) == ("int64", 0.0)
