"""Jobs on a real Slurm: from sbatch to a finished run, and every way to be interrupted on the way."""

from itertools import pairwise

import pytest

from slurm.runs import newest_step
from tests.integration.conftest import losses
from tests.slurm.compare import assert_as_if_undisturbed, assert_no_step_was_done_twice, assert_saved, ledger
from tests.slurm.jobs import NUM_STEPS
from unimo3.training.heartbeat import read_heartbeats

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("slurm_jobs")]

TWO = ("--nodes=2",)


@pytest.fixture(scope="module", autouse=True)
def limited(jobs):
    """A job that waits for the signal before its time limit; it takes minutes, so it runs next to the others."""
    # The signal comes after four minutes, or up to a minute early.
    options = ("--nodelist=n3", "--ntasks-per-node=2", "--overcommit", "--time=5", "--signal=USR2@60")
    arguments = ("--data.ledger", "true", "--training.log_every", 1)
    return jobs.submit("limited", *arguments, options=options, inject={"until_stop": [4]})


@pytest.fixture(scope="module", autouse=True)
def hung(jobs):
    """A job that hangs until its time limit is near, and nobody else ends it; it also runs next to the others."""
    # A signal that comes early would have the next start saved and requeued: it goes to the script alone.
    options = ("--nodelist=n3", "--ntasks-per-node=2", "--overcommit", "--time=6", "--signal=B:USR2@1")
    once = str(jobs.folder / "hung_once")
    return jobs.submit("hung", "--data.ledger", "true", options=options, inject={"freeze": [3, 1]}, ONCE=once)


# The first test, since it needs no finished run: the two jobs above begin before one is waited for.
def test_a_job_with_a_wrong_setting_is_held_with_the_reason(jobs):
    job = jobs.submit("wrong", "--optim.lr", "-1", options=TWO)
    jobs.wait_state(job, "SPECIAL_EXIT")
    assert "status 78" in jobs.cluster.job(job)["Comment"]
    assert "optim.lr" in jobs.log(job)
    jobs.cluster.call("scancel", job)


def test_a_job_trains_on_two_nodes_to_its_end(jobs, straight):
    assert len(jobs.steps("straight")) == NUM_STEPS
    (attempt,) = jobs.attempts("straight", number=1)
    assert (attempt.status, attempt.action, attempt.nodes) == (0, "done", "n1 n2")
    assert {beat.phase for beat in read_heartbeats(straight)} == {"ended"}


def test_a_job_interrupted_in_every_way_continues_as_if_nothing_had_been(jobs, straight):
    name = "interrupted"
    events = {
        2: lambda job: jobs.cluster.call("scancel", "--signal=USR1", job),
        4: lambda job: jobs.cluster.call("scontrol", "requeue", job),
        5: lambda job: (jobs.runs / name / "requeue").touch(),
        7: lambda job: jobs.wait_state(jobs.preempt(), "COMPLETED"),
    }
    options = ("--nodes=2", "--nodelist=n1,n2", "--exclusive")
    job = jobs.submit(name, "--data.ledger", "true", options=options, inject={"until_stop_of_start": list(events)})
    num_done = []
    for step, interrupt in events.items():
        jobs.wait_step(job, name, step)
        num_done.append(len(jobs.steps(name)))
        interrupt(job)
    jobs.wait_state(job, "COMPLETED")
    assert_as_if_undisturbed(jobs.runs / name, straight)
    for attempts, done in zip(pairwise(jobs.attempts(name, number=5)), num_done, strict=True):
        assert_saved(*attempts, done)
    assert int(jobs.cluster.job(job)["Restarts"]) == 4


def test_a_cancelled_job_stays_cancelled_and_has_saved(jobs, straight):
    job = jobs.submit("cancelled", "--data.ledger", "true", options=TWO, inject={"until_stop": [5]})
    jobs.wait_step(job, "cancelled", 5)
    num_done = len(jobs.steps("cancelled"))
    jobs.cluster.call("scancel", job)
    jobs.wait_ended(job)
    assert jobs.state(job) == "CANCELLED"
    done = len(jobs.steps("cancelled"))
    assert newest_step(jobs.runs / "cancelled") == done >= num_done
    assert losses(jobs.runs / "cancelled") == losses(straight)[:done]
    assert ledger(jobs.runs / "cancelled") == {step: ledger(straight)[step] for step in range(1, done + 1)}


def test_a_killed_rank_is_an_infrastructure_failure_and_requeued(jobs, straight):
    once = jobs.folder / "killed_once"
    job = jobs.submit("killed", "--data.ledger", "true", options=TWO, inject={"kill": [6, 1]}, ONCE=str(once))
    jobs.wait_state(job, "COMPLETED")
    assert_as_if_undisturbed(jobs.runs / "killed", straight)
    first, second = jobs.attempts("killed", number=2)
    assert (first.action, second.action) == ("requeue", "done")
    assert first.status not in (0, 70, 75, 78)


def test_a_frozen_rank_is_named_ended_and_the_job_requeued(jobs, straight):
    once = jobs.folder / "frozen_once"
    job = jobs.submit(
        "frozen",
        "--data.ledger",
        "true",
        "--training.stall_after_s",
        30,
        options=TWO,
        inject={"freeze": [6, 1]},
        ONCE=str(once),
    )
    jobs.wait_state(job, "COMPLETED")
    assert_as_if_undisturbed(jobs.runs / "frozen", straight)
    assert "the others wait for rank 1 on " in jobs.log(job)
    assert (jobs.attempts("frozen")[0].status, jobs.attempts("frozen")[0].action) == (71, "requeue")


def test_a_lost_node_requeues_and_the_job_continues_with_fewer(jobs, straight):
    job = jobs.submit(
        "lost", "--data.ledger", "true", options=("--nodes=1-2", "--exclude=n3"), inject={"until_stop": [6]}
    )
    jobs.wait_step(job, "lost", 6)
    jobs.cluster.lose_node("n2")
    try:
        jobs.wait_state(job, "COMPLETED")
    finally:
        jobs.cluster.start_node("n2")
        jobs.cluster.wait(lambda: jobs.cluster.node_states()["n2"] == "idle", "n2 again")
    assert [record["step"] for record in jobs.steps("lost")] == list(range(1, NUM_STEPS + 1))
    for one, other in zip(losses(jobs.runs / "lost"), losses(straight), strict=True):
        assert one["loss_mlm"] == pytest.approx(other["loss_mlm"], rel=0.02)
    assert ledger(jobs.runs / "lost") == ledger(straight)
    assert "from 2 ranks to 1" in jobs.log(job)


def test_a_job_whose_losses_stay_not_finite_is_held(jobs):
    nan = [[step, 0] for step in range(3, NUM_STEPS)]
    job = jobs.submit("nan", "--training.max_skipped", 2, options=TWO, inject={"nan": nan})
    jobs.wait_state(job, "SPECIAL_EXIT")
    assert "the loss remained non-finite (status 70)" in jobs.cluster.job(job)["Comment"]
    # Two steps were tolerated, the third ended the run.
    steps = jobs.steps("nan")
    assert [record["loss"] is None for record in steps] == [False] * 3 + [True] * 3
    assert steps[-1]["skipped_steps"] == 3
    assert newest_step(jobs.runs / "nan") == 4
    jobs.cluster.call("scancel", job)


def test_a_stop_file_ends_the_job_without_a_requeue(jobs):
    job = jobs.submit("stopped", options=TWO, inject={"until_stop": [3]})
    jobs.wait_step(job, "stopped", 3)
    (jobs.runs / "stopped" / "stop").touch()
    jobs.wait_state(job, "COMPLETED")
    assert 3 <= len(jobs.steps("stopped")) < NUM_STEPS
    assert jobs.attempts("stopped")[-1].action == "done"


def test_the_time_limits_signal_requeues_before_the_end(jobs, limited, straight):
    jobs.wait_state(limited, "COMPLETED")
    assert_as_if_undisturbed(jobs.runs / "limited", straight)
    log = jobs.log(limited)
    assert "asked to stop (SIGUSR2)" in log
    attempts = jobs.attempts("limited")
    assert [attempt.status for attempt in attempts] == [75] * (len(attempts) - 1) + [0]
    assert_no_step_was_done_twice(log)


def test_a_job_that_hangs_is_requeued_just_before_its_time_limit(jobs, hung, straight):
    jobs.wait_state(hung, "COMPLETED")
    assert_as_if_undisturbed(jobs.runs / "hung", straight)
    assert "requeue: the time limit is near and the program has not ended" in jobs.log(hung)
    *earlier, last = jobs.attempts("hung")
    # A busy machine may reach the limit once more.
    assert earlier
    assert last.action == "done"
