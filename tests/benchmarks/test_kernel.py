"""The kernel benchmark: its contestants compute the same, and it writes its report."""

import pytest
import torch

from benchmarks import kernel


def run(argv):
    with pytest.raises(SystemExit) as end:
        kernel.main(argv)
    return end.value.code


@pytest.mark.integration
@pytest.mark.parametrize("padded", [False, True])
def test_all_contestants_compute_the_same(padded):
    case = kernel.Case("odd", 2, 3, 7, 11, 16, 3, padded, torch.float32)
    inputs, grad = kernel.draw(case, torch.device("cpu"))
    leaves = [inputs["q"], inputs["gate"], *inputs["k"], *inputs["v"]]
    expected = kernel.separate(**inputs)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    for attend in (kernel.ours, kernel.stacked):
        actual = attend(**inputs)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        for one, other in zip(torch.autograd.grad(actual, leaves, grad), expected_grads, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_operations_are_those_of_two_products():
    case = kernel.Case("odd", 2, 3, 7, 11, 16, 4, False, torch.float32)
    one_product = 2 * (2 * 3) * 7 * 11 * 16  # a multiplication and an addition
    assert case.flops == 4 * 2 * one_product


@pytest.mark.integration
def test_the_report_compares_each_contestant_with_ours(tmp_path):
    out = tmp_path / "kernel.md"
    argv = ["--cpu", "--rounds", "2", "--cases", "tiny", "--contestants", "separate", "stacked", "--out", str(out)]
    assert run(argv) == 0
    rows = [line for line in out.read_text().splitlines() if line.startswith("| tiny, T ")]
    assert [row.split("|")[2].strip() for row in rows] == ["ours", "separate", "stacked"] * 4
    assert all("times as fast" in row for row in rows if "| ours |" not in row)
    assert "## Measured on" in out.read_text()


def test_arguments_that_cannot_be_measured_are_named(capsys):
    argv = ["--cpu", "--rounds", "0", "--contestants", "flex", "--cases", "huge"]
    assert run(argv) == 78
    message = capsys.readouterr().err
    for part in ("--rounds 0", "--contestants flex: has no backward pass on CPUs", "--cases huge: one of cpu, tiny"):
        assert part in message
    if not torch.cuda.is_available():
        assert run([]) == 78
        assert "no GPU is found; use --cpu" in capsys.readouterr().err
