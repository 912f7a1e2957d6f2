"""Who holds up the others, from the heartbeats of all ranks."""

import time
from pathlib import Path

from unimo3.training.watch import Heartbeat, describe_stall


def beat(rank, phase, beats, since_s, silent_s=0.0):
    now = time.time()
    return Heartbeat(rank, "node", 10**7 + rank, 2, phase, beats, now - since_s, now - silent_s)


def told(*beats):
    return describe_stall(list(beats), 5.0, 4.0, Path("run"))


def test_the_rank_that_passed_fewest_phases_is_named_however_early_another_came_to_wait():
    text = told(beat(0, "data", 7, since_s=5.0), beat(1, "wait", 8, since_s=5.5))
    assert "the others wait for rank 0 on node" in text
    assert "in phase 'data' of step 2 for 5 s" in text


def test_a_silent_rank_is_named_before_one_that_is_behind():
    assert "the others wait for rank 1 on" in told(beat(0, "data", 7, 5.0), beat(1, "wait", 8, 5.5, silent_s=9.0))
