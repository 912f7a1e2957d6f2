"""What a job does next."""

import signal

import pytest

from slurm import history
from slurm.outcome import decide, settled_status


def attempts(*records, action="requeue"):
    return [
        history.Attempt(0.0, "1", 0, "n1", checkpoint, status=status, action=action) for checkpoint, status in records
    ]


def test_failures_before_somebody_looked_and_nodes_that_were_avoided_do_not_count():
    vain = attempts(*[(5, 1)] * 4)
    assert decide(1, vain, 5, 20, False)[0] == "hold"
    held = [*vain, *attempts((5, 1), action="hold")]
    assert decide(1, [*held, *attempts((5, 1))], 5, 20, False)[0] == "requeue"
    assert decide(1, [*attempts(*[(5, -2)] * 4, action="exclude"), *attempts((5, 1))], 5, 20, False)[0] == "requeue"


@pytest.mark.parametrize(
    ("status", "before", "checkpoint", "in_array", "action"),
    [
        (0, [], 5, False, "done"),
        (75, [], 5, False, "requeue"),
        (75, [], 5, True, "link"),
        (78, [], 5, False, "hold"),
        (70, [], 5, False, "hold"),
        (137, [(5, 137)], 5, False, "requeue"),
        (71, [(5, 137), (5, 1), (5, 71)], 5, False, "requeue"),  # the third restart
        (71, [(5, 137), (5, 1), (5, 71), (5, 71)], 5, False, "hold"),
        (71, [(5, 137), (5, 1), (5, 71), (5, 71)], 9, False, "requeue"),  # a checkpoint has come
        (71, [(None, 1), (5, 1), (10, 1), (15, 1), (20, 1)], 25, False, "hold"),  # MAX_RESTARTS
        (71, [(5, 1), (5, 75), (5, 1), (5, 1)], 5, False, "hold"),  # a stop that came too early counts
        (75, [(5, 75)] * 10, 5, False, "requeue"),
        (75, [(5, 75)] * 11, 5, False, "hold"),
    ],
)
def test_what_follows_from_an_end(status, before, checkpoint, in_array, action):
    assert decide(status, attempts(*before), checkpoint, 4, in_array)[0] == action


def test_the_status_that_counts_is_the_one_that_knows_why(tmp_path):
    assert settled_status(137, tmp_path) == 137
    (tmp_path / "rank_0").write_text("78")
    assert settled_status(143, tmp_path) == 78
    (tmp_path / "rank_0").write_text("75")  # it says so when all have saved
    assert settled_status(137, tmp_path) == 75
    assert settled_status(0, None) == 0
    assert [settled_status(128 + number, None) for number in (signal.SIGUSR1, signal.SIGUSR2)] == [75, 75]
