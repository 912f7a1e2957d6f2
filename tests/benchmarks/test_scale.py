"""The scale benchmark: small runs of its parts, what counts as an operation, and a result that grows part by part."""

from collections import Counter

import pytest

from benchmarks import scale
from benchmarks.file_operations import operations, per_minute
from benchmarks.scale_checkpoint import measure_elastic_plan
from benchmarks.scale_run import RankOperations, RunOperations, run_table
from benchmarks.simulated_ranks import on_simulated_ranks
from unimo3 import distributed


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        scale.main([str(word) for word in arguments])
    return end.value.code


def test_simulated_ranks_exchange_what_real_ones_do():
    def action():
        rank, size = distributed.world()
        gathered = distributed.all_gather_object("x" * rank)
        read_once = distributed.from_first_rank("reading", lambda: [rank], "fix it")
        return rank, size, gathered, read_once

    costs = on_simulated_ranks(3, action, measured={0, 2})
    assert [cost.result for cost in costs] == [(rank, 3, ["", "x", "xx"], [0]) for rank in range(3)]
    assert len({cost.received_bytes for cost in costs}) == 1
    assert distributed.world() == (0, 1)


def test_a_simulated_rank_that_fails_ends_the_others():
    def action():
        if distributed.world()[0] == 1:
            raise ValueError("planted")
        distributed.all_gather_object(None)

    with pytest.raises(ValueError, match="planted"):
        on_simulated_ranks(3, action, measured=())


def test_a_rank_opens_few_files_beyond_those_it_reads_values_from(tmp_path):
    ranks = measure_elastic_plan(10**6, 16, 12, tmp_path)
    assert [rank.rank for rank in ranks] == [0, 1, 6, 11]
    assert all(rank.opens <= 8 for rank in ranks)
    assert [rank.opens for rank in ranks][1:] == [2, 2, 4]
    assert all(0 < rank.read_files < 16 for rank in ranks)


@pytest.mark.integration  # git, for the commit of the result
def test_parts_replace_their_sections_of_the_result(tmp_path):
    out = tmp_path / "scale.md"
    small = ("--before", 4, "--after", 3, "--parameters", 1e6, "--files", 8, "--work", tmp_path, "--out", out)
    assert not run(*small, "--part", "elastic", "commit")
    first = out.read_text()
    assert "| 0 | " in first
    assert "A checkpoint of 8 small files" in first
    assert not run(*small, "--files", 10, "--part", "commit")
    again = out.read_text()
    assert "A checkpoint of 10 small files" in again
    assert "A checkpoint of 8 small files" not in again
    assert again.split("## Committing")[0].split("\n\n", 2)[2] == first.split("## Committing")[0].split("\n\n", 2)[2]
    assert again.count("## Measured on") == 1


TRACE = """\
7 10.0 openat(AT_FDCWD</here>, "/runs/a/heartbeats/rank_00005.json.tmp", O_WRONLY|O_CREAT) = 4</runs/a/h>
7 10.1 write(4</runs/a/heartbeats/rank_00005.json.tmp>, "{}", 2) = 2
7 10.2 close(4</runs/a/heartbeats/rank_00005.json.tmp>) = 0
8 10.3 rename("/runs/a/heartbeats/rank_00005.json.tmp", "/runs/a/heartbeats/rank_00005.json" <unfinished ...>
7 10.4 write(1</log>, "resumed from /runs/a/checkpoints", 32) = 32
8 10.5 <... rename resumed>) = 0
7 10.6 newfstatat(4</runs/a/stop>, "", {st_mode=S_IFREG|0644}, AT_EMPTY_PATH) = 0
7 10.7 newfstatat(AT_FDCWD</here>, "/runs/a/stop", 0x7ffe, 0) = -1 ENOENT (No such file or directory)
7 10.8 fcntl(5</runs/a/heartbeats/rank_00005.lock>, F_GETFD) = 0x1
7 10.9 openat(AT_FDCWD</here>, "/runs/ab/config.yaml", O_RDONLY) = 4</runs/ab/config.yaml>
7 99.0 openat(AT_FDCWD</here>, "/runs/a/stop", O_RDONLY) = 4</runs/a/stop>
"""


def test_operations_are_calls_on_the_folder_that_need_its_server(tmp_path):
    (tmp_path / "trace").write_text(TRACE)
    counts = per_minute(operations(tmp_path / "trace", "/runs/a"), 10.0, 40.0)
    beat = "rank_N.json.tmp"
    names = [f"openat {beat}", f"write {beat}", f"close {beat}", f"rename {beat}", "newfstatat stop"]
    assert counts == dict.fromkeys(names, 2.0)


def test_the_mean_rate_counts_rank_0_once():
    rates = [{"write metrics.jsonl": 1024.0}, {"rename beat": 3.0}]
    measured = RunOperations([RankOperations(9, Counter(rate), 5) for rate in rates], minutes=2.0, num_steps=10)
    assert measured.mean_rate(1024) == pytest.approx(1 + 3 * 1023 / 1024)
    assert "= **4.00\noperations a rank and minute**" in run_table(1024, measured)


def test_numbers_that_cannot_be_measured_are_refused_together(capsys):
    assert run("--before", 1, "--ranks", 0, "--part", "run") == 78
    printed = capsys.readouterr().err
    assert "--before 1: at least 2 is needed" in printed
    assert "--ranks 0: at least 2 is needed" in printed
    assert run("--files", 7) == run("--minutes", 0) == 78
