"""The checkpoint benchmark: a small run compares and writes its report, and a load needs little memory."""

import pytest

from benchmarks import checkpoint
from benchmarks.checkpoint_elastic import Loaded, elastic_table, make_checkpoint
from benchmarks.checkpoint_engine import in_ranks

LAYER = 2048**2
MB = 10**6


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        checkpoint.main([str(word) for word in arguments])
    return end.value.code


def test_a_small_run_writes_all_three_comparisons(tmp_path, program):
    out = tmp_path / "result.md"
    sizes = ("--export", 1e6, "--elastic", LAYER, "--blocked", LAYER)
    program.check(0, "benchmarks.checkpoint", *sizes, "--rounds", 1, "--work", tmp_path, "--out", out)
    text = out.read_text()
    for row in ("| ours, --no-verify |", "| zero_to_torch |", "| ds_to_universal |", "| background, later |"):
        assert row in text
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.integration
def test_another_number_of_ranks_needs_little_more_than_the_engine_itself(tmp_path):
    """The largest parameter is 17 MB in float32, all of them are 134 MB, the engine's moments 268 MB."""
    count = 8 * LAYER
    command = (1, "benchmarks.checkpoint_elastic", "ours", make_checkpoint(tmp_path, count), count)
    # What the machine does meanwhile only adds: once in a full run 67 MB, else less than 9.
    peak = min(in_ranks(*command)["peak_bytes"] for _ in range(2))
    assert 8 * count < peak < 8 * count + 60 * MB


def test_a_load_that_does_not_fit_counts_as_no_time():
    table = elastic_table({10**9: {"ours": Loaded(1.0, 2.0, 5), "ds_to_universal": Loaded(6.0, None, 7)}})
    assert "| 1.00B | ours | 1.00 | 2.00 | 0.50 |" in table
    assert "| 1.00B | ds_to_universal | 6.00 | does not fit | 1.00 |" in table


def test_sizes_that_cannot_be_measured_are_refused_together(capsys):
    assert run("--export", 5, "--blocked", 7, "--rounds", 0) == 78
    printed = capsys.readouterr().err
    for problem in ("--export 5: at least 1e+06", "--blocked 7: at least", "--rounds 0: at least 1"):
        assert problem in printed
