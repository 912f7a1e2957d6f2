"""Jobs whose environment changes what Slurm's commands print, or what belongs to another job: the result stays."""

import os

import pytest

from slurm import history
from tests.slurm.test_work import batch, script_of

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("slurm_submission")]

# Neighbours act on the same commands, so they are in different jobs.
NUM_JOBS = 9
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
    "SLURM_MEM_PER_NODE": "100",
    "SLURM_MEM_PER_GPU": "100",
    "SLURM_GPUS_PER_TASK": "3",
    "SLURM_GPU_BIND": "map_gpu:7",
    "SLURM_TIMELIMIT": "1-00",
    "SLURM_RESTART_COUNT": "9",
    "SLURM_CPUS_PER_TASK": "64",
    "SRUN_CPUS_PER_TASK": "64",
    "SBATCH_SIGNAL": "B:USR1@60",
    "SBATCH_EXPORT": "ALL",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "LC_ALL": "de_DE.UTF-8",
    "LC_NUMERIC": "de_DE.UTF-8",
    "LANG": "ja_JP.eucJP",
    "TZ": "Asia/Kathmandu",
    "TMPDIR": "/nowhere",
    "CDPATH": "/",
    "PATH": "/nowhere:/usr/bin:/bin",
    "LD_PRELOAD": "/nowhere/library.so",
    "PYTHONIOENCODING": "latin-1",
    "SLURM_GPUS_PER_NODE": "8",
    "SLURM_GPUS": "8",
    "SLURM_WORKING_DIR": "/nowhere",
    "SLURM_STDOUTMODE": "none",
    "SLURM_DISTRIBUTION": "arbitrary",
    "UNIMO3_STATUS_DIR": "/nowhere",
    "IS_DECIDED": "yes",
    "RUN": "/nowhere",
    "STEP_MINUTES": "nonsense",
    "KILL_ON_BAD_EXIT": "nonsense",
}
ENDS_75_THEN_78 = """#!/bin/bash
printf 'a greeting without an end'
[[ "$*" == "-m pretrain.train "* ]] || exec {python} "$@"
! mkdir {folder}/once.$SLURM_JOB_ID || exit 75
exit 78
"""


def test_no_inherited_variable_changes_what_becomes_of_a_job(site, tmp_path):
    facts = 'echo "$JOB has $NUM_RANKS ranks, $(seconds_left) s, is $(state_of "$JOB"), restart $NUM_RESTARTS" || true'
    train = f"train pretrain.train --config {site.recipe} --run.dir {tmp_path} --run.name $SLURM_JOB_ID"
    script = script_of(tmp_path, f"{facts}; {train}")
    python = tmp_path / "python"
    python.write_text(ENDS_75_THEN_78.format(python=site.python, folder=tmp_path))
    python.chmod(0o755)
    prints = tmp_path / "prints.sh"
    prints.write_text("echo a banner\n")

    def submit(options=("--mem-per-cpu=10",), **variables):
        options = ("--open-mode=append", "--signal=USR2@300", *options)
        return batch(site, script, options=options, UNIMO3_PYTHON=str(python), PREFLIGHT="no", **variables)

    hostile = [*HOSTILE.items(), ("BASH_ENV", str(prints))]
    groups = [dict(hostile[number::NUM_JOBS]) for number in range(NUM_JOBS)]
    jobs = {", ".join(group): submit(**group) for group in groups[1:]}
    before = os.umask(0o077)
    jobs[", ".join(groups[0]) + ", umask"] = submit(**groups[0])
    os.umask(before)
    jobs["a full disk for the log"] = submit(options=("--output=/dev/full",))
    for name, job in jobs.items():
        site.wait_state(job, "SPECIAL_EXIT")
        assert site.cluster.job(job)["Comment"].startswith("held: a setting, a file or a checkpoint"), name
        assert [end.action for end in history.read(tmp_path / str(job))] == ["requeue", "hold"], name
        starts = [line for line in site.log(job).splitlines() if line.startswith(f"{job} has ")]
        for number, start in enumerate(starts):
            ranks, left, state, restart = start.removeprefix(f"{job} has ").split(", ")
            assert (ranks, state, restart) == ("1 ranks", "is RUNNING", f"restart {number}"), name
            assert 7000 < int(left.split()[0]) <= 7200, (name, start)
        assert len(starts) == (0 if name == "a full disk for the log" else 2), name
    site.cluster.call("scancel", *jobs.values())


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
    preflight = "HOSTS=$SLURMD_NODENAME; preflight 2; echo passed"
    script = script_of(tmp_path, f"{preflight}; {shared}; preflight 2; echo passed again")
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
