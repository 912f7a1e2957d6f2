"""Starts that end before anything is written to the run's folder, and a container in which no Slurm is."""

import json

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("slurm_submission")]

ONE = ("--nodes=1",)


@pytest.fixture(scope="module", autouse=True)
def broken(jobs):
    """A job of a site whose settings fail; it takes a while to give up."""
    (jobs.folder / "failing.env").write_text("RANKS_PER_NODE=1\nfalse\n")
    return jobs.submit("broken", options=ONE, UNIMO3_SITE=str(jobs.folder / "failing.env"))


def test_a_node_that_cannot_start_python_is_excluded_and_noted(jobs):
    python = jobs.folder / "python_that_n1_lacks"
    python.write_text(f'#!/bin/bash\n[[ $SLURMD_NODENAME != n1 ]] || exit 127\nexec {jobs.python} "$@"\n')
    python.chmod(0o755)
    ledger = jobs.folder / "bad_first.jsonl"
    job = jobs.submit(
        "first_node",
        "--training.stop_after",
        1,
        options=("--nodes=1-2", "--exclude=n3"),
        UNIMO3_PYTHON=str(python),
        BAD_NODES=str(ledger),
    )
    jobs.wait_state(job, "COMPLETED")
    assert jobs.attempts("first_node")[-1].nodes == "n2"
    assert json.loads(ledger.read_text())["node"] == "n1"
    printed = jobs.cluster.job(job)
    assert sorted(printed["ExcNodeList"].split(",")) == ["n1", "n3"]
    assert "ended early" not in printed.get("Comment", "")


def test_in_a_container_without_slurm_one_job_has_the_folder(jobs):
    (jobs.folder / "container.env").write_text(
        f"RANKS_PER_NODE=1\nLOCAL_DISK={jobs.folder}/local\nCONTAINER=(env PATH=/nowhere)\n"
    )
    is_held = jobs.folder / "one_is_held"
    inject = {"until_file": [1, str(is_held)]}
    both = [
        jobs.submit(
            "contained",
            "--training.stop_after",
            2,
            options=ONE,
            inject=inject,
            UNIMO3_SITE=str(jobs.folder / "container.env"),
        )
        for _ in range(2)
    ]
    jobs.cluster.wait(lambda: "SPECIAL_EXIT" in [jobs.state(job) for job in both], "one to be held")
    is_held.touch()
    held = next(job for job in both if jobs.state(job) == "SPECIAL_EXIT")
    (other,) = set(both) - {held}
    assert f"held: job {other} uses" in jobs.cluster.job(held)["Comment"]
    jobs.wait_state(other, "COMPLETED")
    assert len(jobs.steps("contained")) == 2
    jobs.cluster.call("scancel", held)


def test_a_start_that_fails_early_is_retried_three_times_then_held(jobs, broken):
    jobs.wait_state(broken, "SPECIAL_EXIT")
    printed = jobs.cluster.job(broken)
    assert "held: retries exhausted: 4 starts ended early on " in printed["Comment"]
    assert printed["Restarts"] == "4"
    jobs.cluster.call("scancel", broken)
