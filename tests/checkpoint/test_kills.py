"""A rank killed at any moment of a save: the run resumes from a complete checkpoint with the same results.

The same kills with DeepSpeed's save and load, as the control, leave runs that cannot be resumed.
"""

from typing import Any

import pytest

from tests.checkpoint.kills import begin, trials
from tests.spawn import KILLED

POINTS = 30


def is_correct(straight: list[list[float]], trial: dict[str, Any]) -> bool:
    """Whether both ranks resumed the same step and computed what the uninterrupted run did."""
    if any(isinstance(results, str) for results in trial["resumed"]):
        return False
    (step, _), (other, _) = trial["resumed"]
    return (
        step == other
        and step in (2, 4)
        and [losses for _, losses in trial["resumed"]] == [losses[step:] for losses in straight]
    )


@pytest.mark.integration
def test_every_kill_leaves_a_checkpoint_to_resume_from(tmp_path):
    straight, kills = begin(tmp_path, "own"), list(trials(tmp_path, "own", POINTS))
    assert len(kills) >= POINTS
    # The other rank is killed as well, unless it has noticed before and failed by itself.
    assert all(kill["killed"][kill["victim"]] == KILLED for kill in kills)
    assert [kill for kill in kills if not is_correct(straight, kill)] == []
    # Before the commit and after it; points are spread over all events of both ranks, in both kinds of save.
    assert {kill["resumed"][0][0] for kill in kills} == {2, 4}
    for kind in ("point", "byte"):
        victims = {(kill["background"], kill["victim"]) for kill in kills if kill[kind] is not None}
        assert victims == {(b, v) for b in (False, True) for v in (0, 1)}


@pytest.mark.integration
def test_saves_of_deepspeed_alone_do_not_survive_kills(tmp_path):
    straight, kills = begin(tmp_path, "plain"), list(trials(tmp_path, "plain", 4))
    assert not all(is_correct(straight, kill) for kill in kills)
