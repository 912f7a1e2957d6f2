"""The kernel benchmark: its contestants compute the same, and it writes its report."""

from dataclasses import replace

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
    results = kernel.measure(case, ("ours", "separate", "stacked"), 1, torch.device("cpu"))
    assert all(result.error < 1e-5 for result in results.values())
    dropped = kernel.measure(replace(case, dropout_p=0.5), ("ours", "separate"), 1, torch.device("cpu"))
    assert all(result.error is None and result.both_s > 0 for result in dropped.values())


def test_a_contestant_that_fails_gives_its_reason_and_the_others_go_ahead(monkeypatch):
    monkeypatch.setattr(kernel, "stacked", None)
    case = kernel.Case("odd", 1, 1, 3, 5, 16, 2, False, torch.float32)
    results = kernel.measure(case, ("stacked", "separate"), 1, torch.device("cpu"))
    assert "TypeError: 'NoneType' object is not callable" in results["stacked"]
    assert results["separate"].both_s > 0
    assert "| stacked | TypeError" in kernel.table({case: results})


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
    assert [row.split("|")[2].strip() for row in rows] == ["ours", "separate", "stacked"] * 6
    assert all("times as fast" in row for row in rows if "| ours |" not in row)
    assert "## Measured on" in out.read_text()


@pytest.mark.integration
def test_a_budget_ends_after_a_case_and_the_report_counts_missing_cases(tmp_path):
    out = tmp_path / "kernel.md"
    options = ["--rounds", "1", "--cases", "tiny", "--contestants", "separate", "--budget", "1e-9"]
    assert run(["--cpu", *options, "--out", str(out)]) == 0
    assert "5 of 6 cases are not measured." in out.read_text()


def test_arguments_that_cannot_be_measured_are_named(capsys):
    argv = ["--cpu", "--rounds", "0", "--contestants", "flex", "--cases", "huge"]
    assert run(argv) == 78
    message = capsys.readouterr().err
    for part in ("--rounds 0", "--contestants flex: needs a GPU", "--cases huge: one of cpu, tiny"):
        assert part in message
    if not torch.cuda.is_available():
        assert run([]) == 78
        assert "no GPU is found; use --cpu" in capsys.readouterr().err
