"""Submitting on a real Slurm: chains, many jobs at once, nodes to avoid, other jobs on the same run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slurm import bad_nodes, history, status, submit
from slurm.site_config import Site
from tests.slurm.compare import assert_as_if_undisturbed, assert_no_step_was_done_twice
from tests.slurm.jobs import NUM_STEPS
from tests.spawn import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("slurm_submission")]


def run_program(program, *arguments):
    with pytest.raises(SystemExit) as ended:
        program.main([str(word) for word in arguments])
    return ended.value.code


@pytest.fixture(scope="module", autouse=True)
def links(jobs):
    """An array whose links wait for the signal before their time limit; it takes minutes, next to the other tests."""
    words = ["--config", str(jobs.recipe), "--run.name", "links", "--training.steps", str(NUM_STEPS)]
    words += ["--data.ledger", "true", "--training.log_every", "1"]
    # As on a site that lets no job run for longer: each link is asked to stop on its way.
    command = submit.sbatch_command(
        submit.parse_arguments(["--nodes", "2", "--chain", "3", "--time", "3", "--grace", "60", "pretrain", *words]),
        Site(1, [f"--output={jobs.folder}/links-%a.log", "--nodelist=n2,n3"]),
        words,
        jobs.runs / "links",
    )
    return jobs.sbatch(*command, INJECT='{"until_stop": [3, 6]}', PREFLIGHT="no")


def test_eight_jobs_submitted_at_once_on_one_host_all_rendezvous(jobs):
    options = ("--nodelist=n1", "--ntasks-per-node=2", "--overcommit", "--partition=shared")
    python = jobs.folder / "python_that_joins"
    python.write_text(
        f'#!/bin/bash\n[[ "$*" != "-m pretrain.train "* ]] || set -- -m tests.slurm.join "${{@:3}}"\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    joined = jobs.folder / "joined"
    joined.mkdir()
    # The first one still runs when the last one begins.
    leave = jobs.folder / "all_eight_have_joined"
    variables = {"UNIMO3_PYTHON": str(python), "JOINED": str(joined), "LEAVE": str(leave)}
    numbers = [jobs.submit(f"eight_{n}", options=options, **variables) for n in range(8)]
    names = {f"eight_{n}_{rank}" for n in range(8) for rank in range(2)}
    jobs.cluster.wait(lambda: names == {path.name for path in joined.iterdir() if path.read_text()}, "all 16 ranks")
    assert {path.read_text() for path in joined.iterdir()} == {"[0, 1]"}
    leave.touch()
    for number in numbers:
        jobs.wait_state(number, "COMPLETED")
    assert len({jobs.log(number).split("rendezvous at ")[1].split()[0] for number in numbers}) == 8
    starts = [jobs.attempts(f"eight_{n}")[0] for n in range(8)]
    assert max(start.time for start in starts) < min(start.ended for start in starts)


def test_a_range_of_nodes_gives_as_many_as_there_are(site):
    words = ["--config", str(site.recipe), "--run.name", "wide", "--training.global_batch", "6"]
    words += ["--training.micro_batch", "2", "--training.steps", "1"]
    command = submit.sbatch_command(
        submit.parse_arguments(["--nodes", "2-3", "pretrain", *words]),
        Site(1, [f"--output={site.folder}/%j.log"]),
        words,
        site.runs / "wide",
    )
    job = site.sbatch(*command, PREFLIGHT="no")
    site.wait_state(job, "COMPLETED")
    assert site.attempts("wide")[0].nodes == "n1 n2 n3"
    assert "3 ranks" in site.log(job)


def test_a_job_runs_elsewhere_when_its_node_is_marked_bad(jobs, monkeypatch):
    # Its own disk is none: a file lies where the folder should be.
    trap = jobs.folder / "trap"
    (jobs.folder / "site_of_bad_node.env").write_text(
        f"RANKS_PER_NODE=1\nLOCAL_DISK={jobs.folder}/local\nBAD_NODES={jobs.folder}/bad_here.jsonl\n"
        f"if [[ $SLURMD_NODENAME == n1 ]]; then LOCAL_DISK={trap}/no; export TMPDIR={trap}/no; fi\n"
    )
    trap.write_text("a file")
    job = jobs.submit(
        "avoids",
        "--training.stop_after",
        2,
        options=("--nodes=1",),
        PREFLIGHT="yes",
        UNIMO3_SITE=str(jobs.folder / "site_of_bad_node.env"),
    )
    jobs.wait_state(job, "COMPLETED")
    assert jobs.attempts("avoids")[0].action == "exclude"
    assert jobs.attempts("avoids")[-1].nodes != "n1"
    entry = json.loads((jobs.folder / "bad_here.jsonl").read_text())
    assert entry["node"] == "n1"
    assert "cannot be written" in entry["reason"]
    monkeypatch.setenv("BAD_NODES", str(jobs.folder / "bad_here.jsonl"))
    assert list(bad_nodes.current()) == ["n1"]
    monkeypatch.setattr(bad_nodes.time, "time", lambda: entry["until"] + 1)
    assert bad_nodes.current() == {}


def test_of_two_nodes_the_one_that_does_not_answer_is_avoided(jobs):
    python = jobs.folder / "python_that_n2_lacks"
    python.write_text(
        f'#!/bin/bash\n[[ $SLURMD_NODENAME != n2 || "$*" != *preflight* ]] || exit 127\nexec {jobs.python} "$@"\n'
    )
    python.chmod(0o755)
    job = jobs.submit(
        "avoids_n2",
        "--training.stop_after",
        1,
        options=("--nodes=2",),
        PREFLIGHT="yes",
        UNIMO3_PYTHON=str(python),
        BAD_NODES=str(jobs.folder / "bad_n2.jsonl"),
    )
    jobs.wait_state(job, "COMPLETED")
    first, *_, last = jobs.attempts("avoids_n2")
    assert (first.nodes, first.action) == ("n1 n2", "exclude")
    assert "n2: gave no answer" in first.reason
    assert (last.nodes, last.action) == ("n1 n3", "done")


def test_of_three_nodes_the_one_with_a_slow_network_is_excluded(jobs):
    python = jobs.folder / "python_with_a_slow_network_on_n2"
    python.write_text(
        f'#!/bin/bash\n[[ $SLURMD_NODENAME != n2 || "$*" != *"slurm.preflight network"* ]] || '
        f'set -- -m tests.slow_network "${{@:3}}"\nexec {jobs.python} "$@"\n'
    )
    python.chmod(0o755)
    (jobs.folder / "site_with_a_floor.env").write_text(
        f"RANKS_PER_NODE=1\nLOCAL_DISK={jobs.folder}/local\nMIN_ALLREDUCE_GBPS=0.00001\n"
    )
    job = jobs.submit(
        "avoids_slow",
        options=("--nodes=3",),
        PREFLIGHT="yes",
        SLOW_S="100000",
        UNIMO3_PYTHON=str(python),
        UNIMO3_SITE=str(jobs.folder / "site_with_a_floor.env"),
        BAD_NODES=str(jobs.folder / "bad_network.jsonl"),
    )
    jobs.cluster.wait(lambda: jobs.cluster.job(job)["ExcNodeList"] == "n2", "n2 excluded")
    jobs.cluster.call("scancel", job)
    (attempt,) = jobs.attempts("avoids_slow", number=1)
    assert (attempt.nodes, attempt.action) == ("n1 n2 n3", "exclude")
    entry = json.loads((jobs.folder / "bad_network.jsonl").read_text())
    assert entry["node"] == "n2"
    assert "an all-reduce runs at 0.0" in entry["reason"]


def test_a_job_with_too_few_gpus_is_held_and_no_node_is_excluded(jobs):
    (jobs.folder / "site_with_gpus.env").write_text(f"GPUS_PER_NODE=1\nLOCAL_DISK={jobs.folder}/local\n")
    job = jobs.submit(
        "no_gpus",
        options=("--nodes=1",),
        PREFLIGHT="yes",
        UNIMO3_SITE=str(jobs.folder / "site_with_gpus.env"),
        BAD_NODES=str(jobs.folder / "bad_for_gpus.jsonl"),
    )
    jobs.wait_state(job, "SPECIAL_EXIT")
    assert "the job has 0 GPUs a node" in jobs.cluster.job(job)["Comment"]
    assert not (jobs.folder / "bad_for_gpus.jsonl").exists()
    jobs.cluster.call("scancel", job)


def test_a_job_is_held_on_a_full_disk_and_resumes_when_there_is_space(jobs, straight):
    disk = jobs.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    # Without the right to mount, files that may not grow stand for a disk that has no room.
    is_full, python = jobs.folder / "is_full", jobs.folder / "python_without_room"
    is_full.touch()
    python.write_text(
        f'#!/bin/bash\n[[ "$*" != *pretrain.train* || ! -e {is_full} ]] || ulimit -f 150\nexec {jobs.python} "$@"\n'
    )
    python.chmod(0o755)
    try:
        fill = "--checkpoint.keep_last", 50, "--checkpoint.every_steps", 1, "--run.dir", disk, "--data.ledger", "true"
        variables = {} if is_mounted else {"UNIMO3_PYTHON": str(python)}
        job = jobs.submit("full", *fill, options=("--nodes=2",), **variables)
        jobs.wait_state(job, "SPECIAL_EXIT")
        assert ("No space left on device" if is_mounted else "File too large") in jobs.log(job)
        assert "status 78" in jobs.cluster.job(job)["Comment"]
        remaining = sorted(path.name for path in (disk / "full" / "checkpoints").glob("step_*"))
        assert remaining or not is_mounted
        assert not any(name.endswith(".tmp") for name in remaining)
        if is_mounted:
            subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        is_full.unlink()
        jobs.cluster.call("scontrol", "release", job)
        jobs.wait_state(job, "COMPLETED")
        assert_as_if_undisturbed(disk / "full", straight)
        first, second = history.read(disk / "full")
        assert (first.action, second.action) == ("hold", "done")
        assert second.checkpoint == (int(remaining[-1].removeprefix("step_")) if remaining else None)
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def test_conversion_pretraining_export_and_tuning_form_a_chain(jobs, source, tmp_path_factory):
    """In fresh interpreters, as on a user's cluster."""
    # Not the project's folder, as of a project that is installed.
    folder = tmp_path_factory.mktemp("chain")
    log = f"--output={jobs.folder}/%j.log"

    def chained(after, script, *arguments, preflight="no"):
        options = [f"--dependency=afterok:{after}"] if after else []
        options += ["--time=120", log, f"--chdir={folder}"]
        return jobs.sbatch("sbatch", "--parsable", *options, *script, *arguments, FRESH="yes", PREFLIGHT=preflight)

    scripts = ROOT / "slurm"
    shards = ("--ntasks=2", "--overcommit", scripts / "prepare_shards.sbatch")
    coco_out, vqa_out, weights_out = Path("coco"), Path("vqa"), Path("weights")  # as the next ones name them
    one = chained(None, shards, "coco", "--src", source, "--out", coco_out, "--shard-size", 4, "--tokenizer-vocab", 300)
    two = chained(one, shards, "vqav2", "--src", source, "--out", vqa_out, "--shard-size", 4, "--min-answer-count", 3)
    common = ("--run.dir", "runs", "--data.tokenizer", coco_out / "tokenizer")
    data = ("--data.train", coco_out / "train", "--data.val", coco_out / "val")
    train = ("--config", jobs.recipe, *common, "--training.steps", 4)
    pretrain = ("--nodes=2", scripts / "pretrain.sbatch")
    three = chained(two, pretrain, *train, *data, "--run.name", "pretrained", preflight="yes")
    four = chained(three, (scripts / "export.sbatch",), "runs/pretrained", "--out", weights_out)
    recipe = yaml.safe_load(jobs.recipe.read_text())
    tuning = {key: recipe[key] for key in ("optim", "training", "checkpoint")}
    (folder / "vqa.yaml").write_text(yaml.safe_dump(tuning | {"data": {"max_text_tokens": 16, "num_workers": 0}}))
    five = chained(
        four,
        ("--nodes=2", scripts / "finetune.sbatch"),
        "vqa",
        "--config",
        "vqa.yaml",
        "--init",
        weights_out,
        "--run.name",
        "tuned",
        "--data.train",
        vqa_out / "train",
        "--data.val",
        vqa_out / "val",
        "--data.tokenizer",
        weights_out,
        "--training.steps",
        4,
    )
    for job in (one, two, three, four, five):
        jobs.wait_state(job, "COMPLETED")
    assert (folder / "runs" / "tuned" / "predictions.json").is_file()
    assert (folder / weights_out / "model.safetensors").is_file()


def test_a_second_job_on_a_running_run_is_refused(site, capsys):
    job = site.submit("taken", options=("--nodes=1",), inject={"until_stop": [1]})
    site.wait_step(job, "taken", 1)
    arguments = ("pretrain", "--config", site.recipe, "--run.name", "taken", "--training.steps", NUM_STEPS)
    assert run_program(submit, "--time", "10", "--grace", "90", *arguments) == 78
    assert f"taken: in use by job {job} (" in capsys.readouterr().err
    # Who submits by hand all the same finds the second job held.
    other = site.submit("taken", options=("--nodes=1",))
    site.wait_state(other, "SPECIAL_EXIT")
    assert f"job {job} uses" in site.cluster.job(other)["Comment"]
    assert run_program(status, site.runs / "taken") == 0
    screen = capsys.readouterr().out
    assert f"job         {job} RUNNING on n" in screen
    assert f" of {NUM_STEPS} (" in screen
    site.cluster.call("scancel", job, other)


@pytest.mark.parametrize("name", ['two words, quote\'d "both" $(touch ran) `touch ran`', "--odd"])
def test_odd_names_are_passed_unchanged(site, capsys, name):
    words = ("pretrain", "--config", site.recipe, "--run.name", name, "--training.stop_after", "1")
    assert run_program(submit, "--dry-run", *words) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    done = subprocess.run(["bash", "-c", f'set -- {command}; printf "%s\\0" "$@"'], capture_output=True, text=True)
    assert name in done.stdout.split("\0")
    job = site.submit(name, "--training.stop_after", 1, options=("--nodes=1",))
    site.wait_state(job, "COMPLETED")
    assert len(site.steps(name)) == 1
    assert not (ROOT / "ran").exists()


def test_an_array_of_three_links_finishes_what_one_cannot(jobs, links, straight):
    jobs.cluster.wait(
        lambda: not jobs.cluster.call("squeue", "--noheader", f"--jobs={links}", check=False).strip(), "links"
    )
    attempts = jobs.attempts("links")
    # On a busy machine the last link, which has none after it, is requeued.
    assert (attempts[0].action, attempts[-1].action) == ("link", "done")
    # Slurm's signal may come a minute early, before a link's first step; what was done is saved by each.
    assert_no_step_was_done_twice("".join((jobs.folder / f"links-{n}.log").read_text() for n in range(1, 4)))
    assert_as_if_undisturbed(jobs.runs / "links", straight)
