"""Jobs whose environment changes what Slurm's commands print, or what belongs to another job: the result stays."""

import pytest

from tests.slurm.test_work import batch, script_of

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("slurm_submission")]

HOSTILE = {
    "SQUEUE_PARTITION": "none",
    "SQUEUE_USERS": "nobody",
    "SQUEUE_NAMES": "none",
    "SQUEUE_STATES": "PENDING",
    "SQUEUE_LICENSES": "none",
    "SQUEUE_FORMAT": "%i",
    "SQUEUE_SORT": "-i",
    "SINFO_FORMAT": "%n",
    "SCONTROL_ALL": "1",
    "SLURM_TIME_FORMAT": "relative",
    "SLURM_NTASKS": "7",
    "SLURM_NTASKS_PER_NODE": "7",
    "SLURM_ARRAY_JOB_ID": "1",
    "SLURM_ARRAY_TASK_ID": "1",
    "LC_ALL": "de_DE.UTF-8",
    "LANG": "ja_JP.eucJP",
    "TZ": "Asia/Kathmandu",
    "TMPDIR": "/nowhere",
}


def test_no_inherited_variable_changes_what_a_job_does(site, tmp_path):
    facts = 'echo "$JOB has $NUM_RANKS ranks, $(seconds_left) s, is $(state_of "$JOB")"'
    script = script_of(tmp_path, f"{facts}; ((NUM_RESTARTS == 0)) || exit 0; apply_action requeue why")
    prints = tmp_path / "prints.sh"
    prints.write_text("echo a banner\n")
    variables = HOSTILE | {"BASH_ENV": str(prints)}
    append = ("--open-mode=append",)
    jobs = {name: batch(site, script, options=append, **{name: value}) for name, value in variables.items()}
    for name, job in jobs.items():
        site.wait_state(job, "COMPLETED")
        starts = [line for line in site.log(job).splitlines() if line.startswith(f"{job} has 1 ranks, ")]
        assert len(starts) == 2, (name, site.log(job))
        for start in starts:
            assert 7000 < int(start.split(", ")[1].split()[0]) <= 7200, (name, start)
            assert start.endswith("is RUNNING"), (name, start)
        assert site.cluster.job(job)["Restarts"] == "1", name


def test_a_job_submitted_inside_an_arrays_link_is_not_the_link(site, tmp_path):
    holds = script_of(tmp_path, "apply_action hold why")
    array = batch(site, holds, options=("--array=1-2", "--hold"))
    job = batch(site, holds, SLURM_ARRAY_JOB_ID=str(array), SLURM_ARRAY_TASK_ID="1")
    site.wait_state(job, "SPECIAL_EXIT")
    assert site.cluster.job(job)["Comment"].strip() == "held: why"
    assert "Comment" not in site.cluster.job(f"{array}_1")
    assert site.state(array) == "PENDING"
    site.cluster.call("scancel", job, array)
    (tmp_path / "link").mkdir()
    link = batch(site, script_of(tmp_path / "link", 'echo "this is $JOB"'), options=("--array=3",))
    site.wait_state(f"{link}_3", "COMPLETED")
    assert f"this is {link}_3" in site.log(link)


def test_the_number_of_ranks_is_the_jobs_or_the_sites(site, tmp_path):
    script = script_of(tmp_path, 'echo "$NUM_RANKS ranks"; [[ -z ${SLURM_GPUS:-} ]] || ranks echo "a task"')
    outer = {"SLURM_NTASKS": "7", "SLURM_NTASKS_PER_NODE": "7"}
    asked = {
        ("--ntasks-per-node=2",): outer | {"UNIMO3_RANKS_PER_NODE": "5"},
        ("--nodes=2", "--ntasks-per-node=2"): {},
        ("--nodes=1", "--ntasks=2"): {},
        ("--nodes=1-2",): {"UNIMO3_RANKS_PER_NODE": "2"},
        ("--nodes=1", "--gpus=2", "--ntasks-per-gpu=1"): {},
    }
    jobs = {batch(site, script, options=options, **variables): options for options, variables in asked.items()}
    for job, options in jobs.items():
        site.wait_state(job, "COMPLETED")
        nodes = int(site.cluster.job(job)["NumNodes"])
        assert f"{2 * nodes} ranks\n" in site.log(job), options
    assert site.log(job).count("a task\n") == 2


def test_tasks_that_see_a_gpu_each_pass_and_a_shared_one_holds_the_job(site, tmp_path):
    shared = "unset SLURM_GPUS_PER_TASK; export SLURM_GPU_BIND=map_gpu:0,0 SLURM_GPUS_PER_NODE=2; ulimit -S -n 200"
    preflight = "HOSTS=$SLURMD_NODENAME GPUS_PER_NODE=2; preflight; echo passed"
    script = script_of(tmp_path, f"{preflight}; {shared}; preflight; echo passed again")
    python = site.folder / "python_with_gpus"
    does = '[[ "$*" != *slurm.preflight* ]] || set -- -m tests.fake_gpus "${@:2}"'
    python.write_text(f'#!/bin/bash\n{does}\nexec {site.python} "$@"\n')
    python.chmod(0o755)
    options = ("--ntasks-per-node=2", "--gpus-per-task=1")
    job = batch(site, script, options=options, UNIMO3_PYTHON=str(python), PREFLIGHT="yes")
    site.wait_state(job, "SPECIAL_EXIT")
    log = site.log(job)
    assert "local rank 0 sees 1 GPUs (0) and takes number 0; local rank 1 sees 1 GPUs (1) and takes number 0" in log
    assert "passed\n" in log
    assert "passed again" not in log
    comment = site.cluster.job(job)["Comment"]
    assert "would share a GPU with another: local rank " in comment
    assert "ulimit -n: 200 open files, up to 256 are needed" in comment
    site.cluster.call("scancel", job)
