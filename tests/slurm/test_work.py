"""Exports, conversions and whatever begins a job, on a real Slurm: held, requeued, or one at a time."""

import json
import shutil
import subprocess
import time

import pytest

from slurm import history, status, submit
from slurm.squeue import jobs_on
from tests.slurm.jobs import NUM_STEPS
from tests.spawn import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("slurm_submission")]


def batch(site, *words, options=(), **environment):
    """Submit one of the project's scripts with its words; the job's number."""
    log = f"--output={site.folder}/%j.log"
    return site.sbatch("sbatch", "--parsable", "--time=120", log, *options, *words, **environment)


def script_of(folder, text):
    """A job script that does part of what the project's do."""
    path = folder / "part.sh"
    path.write_text(f"#!/bin/bash\ncd {ROOT}; source slurm/common.sh; setup; RUN={folder}/run\n{text}\n")
    return path


def python_that(site, name, does, programs='"$*" == "-m pretrain."*'):
    """A Python that first does something else, by default for exports and conversions; its path."""
    path = site.folder / name
    path.write_text(f'#!/bin/bash\n[[ {programs} ]] && {does}\nexec {site.python} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_a_job_with_a_wrong_argument_is_held_with_the_reason(site, source, tmp_path):
    # As in a container that greets on standard output.
    greets = python_that(site, "greets", "echo Welcome", programs='"$*" == *slurm.*')
    export = batch(site, "slurm/export.sbatch", tmp_path / "no_run", "--out", tmp_path / "w", UNIMO3_PYTHON=greets)
    shards = ("slurm/prepare_shards.sbatch", "coco", "--src", source, "--out", tmp_path / "o", "--shard-size", 0)
    conversion = batch(site, *shards)
    nameless = batch(site, "slurm/export.sbatch", "runs/a", UNIMO3_PYTHON=greets)
    tasks = [batch(site, "slurm/finetune.sbatch", *words) for words in ((), ("nothing", "--run.name", "x"))]
    for job in (export, conversion, nameless, *tasks):
        site.wait_state(job, "SPECIAL_EXIT")
    for job in (export, conversion):
        assert "has to be fixed (status 78)" in site.cluster.job(job)["Comment"]
    for job in (nameless, *tasks):
        assert "status 78 before the start" in site.cluster.job(job)["Comment"]
    assert "finetune takes a task first" in site.cluster.job(tasks[0])["Comment"]
    assert "finetune takes a task first" in site.log(tasks[0])
    assert [attempt.action for attempt in history.read(tmp_path / "w.job")] == ["hold"]
    site.cluster.call("scancel", export, conversion, nameless, *tasks)


def test_a_copy_of_a_script_without_common_sh_is_held_with_a_reason(site, tmp_path):
    scripts = [shutil.copy(path, tmp_path) for path in (ROOT / "slurm").glob("*.sbatch")]
    log, there = f"--output={site.folder}/%j.log", f"--chdir={tmp_path}"
    numbers = [int(site.cluster.call("sbatch", "--parsable", log, there, path)) for path in scripts]
    for number in numbers:
        site.wait_state(number, "SPECIAL_EXIT")
        assert "no common.sh next to the script" in site.cluster.job(number)["Comment"]
    site.cluster.call("scancel", *numbers)


def test_a_killed_conversion_is_requeued_and_continues_within_its_budget(site, source, tmp_path):
    once = python_that(site, "dies_once", f"mkdir {tmp_path}/once 2>/dev/null && kill -9 $$")
    always = python_that(site, "dies", "kill -9 $$")
    job = batch(
        site, "slurm/prepare_shards.sbatch", "coco", "--src", source, "--out", tmp_path / "o", UNIMO3_PYTHON=once
    )
    out = ("slurm/export.sbatch", tmp_path, "--out", tmp_path / "w")
    other = batch(site, *out, UNIMO3_PYTHON=always, MAX_RESTARTS="0")
    site.wait_state(other, "SPECIAL_EXIT")
    assert "more than MAX_RESTARTS 0" in site.cluster.job(other)["Comment"]
    site.wait_state(job, "COMPLETED")
    assert [attempt.action for attempt in history.read(tmp_path / "o.job")] == ["requeue", "done"]
    assert (tmp_path / "o" / "train" / "index.json").is_file()
    site.cluster.call("scancel", other)


def test_a_conversion_goes_elsewhere_when_its_node_has_no_disk(site, source, tmp_path):
    (tmp_path / "a_file").touch()
    (tmp_path / "site.env").write_text(
        f"if mkdir {tmp_path}/once 2>/dev/null; then LOCAL_DISK={tmp_path}/a_file/no; fi\n"
    )
    words = ("slurm/prepare_shards.sbatch", "coco", "--src", source, "--out", tmp_path / "o")
    noted = {"UNIMO3_SITE": str(tmp_path / "site.env"), "BAD_NODES": str(tmp_path / "bad_nodes.jsonl")}
    job = batch(site, *words, **noted)
    site.wait_state(job, "COMPLETED")
    first, last = history.read(tmp_path / "o.job")
    assert (first.action, last.action) == ("exclude", "done")
    assert "a_file/no: cannot be written" in first.reason
    assert last.nodes != first.nodes


def test_of_two_jobs_that_begin_at_the_same_instant_one_is_held(site, tmp_path):
    both = f"until (($(find {tmp_path} -name 'ready.*' | wc -l) == 2)); do sleep 0.1; done"
    begin = 'apply_policy begin --run "$RUN" --nodes n1'
    stay = f"until [[ -e {tmp_path}/one_is_held ]]; do sleep 0.1; done"
    script = script_of(tmp_path, f"touch {tmp_path}/ready.$SLURM_JOB_ID; {both}; {begin}; {stay}")
    jobs = [batch(site, script) for _ in range(2)]
    site.cluster.wait(lambda: "SPECIAL_EXIT" in [site.state(job) for job in jobs], "one to be held")
    (tmp_path / "one_is_held").touch()
    states = {job: site.state(job) for job in jobs}
    held = next(job for job, state in states.items() if state == "SPECIAL_EXIT")
    (other,) = set(jobs) - {held}
    assert f"job {other} uses {tmp_path}/run" in site.cluster.job(held)["Comment"]
    site.wait_state(other, "COMPLETED")
    assert [attempt.job for attempt in history.read(tmp_path / "run")] == [str(other)]
    # When that has ended it may have the folder.
    site.cluster.call("scontrol", "release", held)
    site.wait_state(held, "COMPLETED")
    assert [attempt.job for attempt in history.read(tmp_path / "run")] == [str(other), str(held)]


def test_a_job_runs_on_expired_nodes_again_but_not_on_the_users(site, tmp_path):
    ledger = tmp_path / "bad_nodes.jsonl"
    script = script_of(tmp_path, "((NUM_RESTARTS)) || apply_action requeue why; sleep infinity")
    job = batch(site, script, options=("--hold", "--exclude=n2,n3"), BAD_NODES=str(ledger))
    history.append(tmp_path / "run", "exclude", job=str(job), nodes=["n3"])
    ledger.write_text(json.dumps({"node": "n3", "reason": "", "job": "1", "until": time.time() - 1}) + "\n")
    assert site.cluster.job(job)["ExcNodeList"] == "n[2-3]"
    site.cluster.call("scontrol", "release", job)
    site.cluster.wait(lambda: site.cluster.job(job)["ExcNodeList"] == "n2", "n3 taken back")
    assert history.excluded(tmp_path / "run", str(job)) == []
    site.cluster.call("scancel", job)


@pytest.mark.parametrize("name", ["plain", 'two  words "q" $(x)', "--odd"])
def test_a_waiting_job_is_detected_however_it_was_submitted(site, name, monkeypatch):
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    monkeypatch.setenv("SQUEUE_PARTITION", "none")
    script = ("slurm/pretrain.sbatch", "--config", site.recipe, "--run.name", name, "--training.steps", NUM_STEPS)
    job = batch(site, *script, options=("--hold",))
    assert jobs_on(site.runs / name) == {str(job): "PENDING"}
    assert jobs_on(site.runs / f"{name} not") == {}
    site.cluster.call("scancel", job)


def test_a_run_whose_first_job_waits_is_shown_with_slurms_reason(site, capsys):
    script = ("slurm/pretrain.sbatch", "--config", site.recipe, "--run.name", "first")
    job = batch(site, *script, options=("--begin=now+1hour",))
    folder = site.runs / "first"
    assert not folder.exists()
    with pytest.raises(SystemExit) as ended:
        status.main([str(folder)])
    assert ended.value.code == 0
    assert f"job         {job} PENDING, BeginTime" in capsys.readouterr().out
    site.cluster.call("scancel", job)


def test_a_job_submitted_from_elsewhere_is_detected(site, tmp_path):
    words = (ROOT / "slurm" / "pretrain.sbatch", "--config", "pretrain/recipes/tiny.yaml")
    job = site.cluster.call("sbatch", "--parsable", "--hold", f"--chdir={tmp_path}", *words).strip()
    assert jobs_on(tmp_path / "runs" / "tiny") == {job: "PENDING"}
    site.cluster.call("scancel", job)


def test_a_second_job_on_a_folder_is_refused_unless_it_waits(site, source, tmp_path, capsys):
    site.site.with_name("cpu.env").write_text(site.site.read_text() + "SBATCH_OPTIONS_CPU=(--hold)\n")
    words = ["prepare_shards", "coco", "--src", str(source), "--out", str(tmp_path / "o")]

    def submitted(*options):
        with pytest.raises(SystemExit) as ended:
            submit.main([*options, *words])
        printed = capsys.readouterr()
        return ended.value.code, printed.out + printed.err

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIMO3_SITE", str(site.site.with_name("cpu.env")))
        status, text = submitted()
        assert status == 0, text
        job = text.split("job ")[1].split(":")[0]
        status, text = submitted()
        assert status == 78
        assert f"o.job: in use by job {job} (PENDING); cancel that job" in text
        status, text = submitted(f"--dependency=afterany:{job}")
        assert status == 0, text
        other = text.split("job ")[1].split(":")[0]
        patch.setenv("UNIMO3_SITE", str(site.folder / "none.env"))
        (site.folder / "none.env").write_text("SBATCH_OPTIONS_CPU=(--partition=nowhere)\n")
        words[-1] = str(tmp_path / "p")
        status, text = submitted()
        assert status == 78
        assert "sbatch rejected the job: sbatch: error: invalid partition specified: nowhere" in text
    subprocess.run(["scancel", job, other], check=True)
