"""What a job does next."""

import errno
import json
import os

import pytest

from slurm import bad_nodes, history
from slurm.requeue_policy import begin, decide, end, final_status, main, preflight


def attempts(*records, action="requeue"):
    return [
        history.Attempt(0.0, "1", 0, "n1", checkpoint, status=status, action=action) for checkpoint, status in records
    ]


def test_failures_before_a_release_and_on_excluded_nodes_do_not_count():
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
def test_each_status_has_its_action(status, before, checkpoint, in_array, action):
    assert decide(status, attempts(*before), checkpoint, 4, in_array)[0] == action


@pytest.mark.parametrize(
    ("checkpoint", "reason"),
    [(5, "stop requested; newest checkpoint: step 5"), (None, "stop requested; no checkpoint yet")],
)
def test_a_stop_names_the_newest_checkpoint_where_there_is_one(checkpoint, reason):
    assert decide(75, [], checkpoint, 4, False) == ("requeue", reason)


MAX_RESTARTS = 20
CLASSES = {
    "an error of the machines": lambda run: end(run, "7", 1, MAX_RESTARTS),
    "a hang": lambda run: end(run, "7", 71, MAX_RESTARTS),
    "memory": lambda run: end(run, "7", 137, MAX_RESTARTS),
    "a lost node": lambda run: ("requeue", ""),  # nobody is left to record it
    "a stop before the first step": lambda run: end(run, "7", 75, MAX_RESTARTS),
    "a preemption before the first step": lambda run: end(run, "7", 143, MAX_RESTARTS, state="PREEMPTED"),
    "pre-flight": lambda run: preflight(run, "7", ["n1", "n2"], run / "none", 1, MAX_RESTARTS),
    "a bad node": lambda run: preflight(run, "7", ["n1", "n2"], bad_node(run), 1, MAX_RESTARTS),
    "a link of an array": lambda run: end_of_link(run),
    "a wrong setting": lambda run: end(run, "7", 78, MAX_RESTARTS),
    "a loss that diverged": lambda run: end(run, "7", 70, MAX_RESTARTS),
}


AGAIN = [kind for kind in CLASSES if kind not in ("a wrong setting", "a loss that diverged")]


def bad_node(run):
    """Results of checks by which one of two nodes is bad."""
    (run / "results").mkdir(exist_ok=True)
    for node, problems in (("n1", ["no GPU"]), ("n2", [])):
        (run / "results" / f"{node}.json").write_text(json.dumps({"problems": problems, "job": []}))
    return run / "results"


def end_of_link(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_ARRAY_TASK_ID", "1")
        patch.setenv("SLURM_ARRAY_TASK_MAX", "900")
        return end(run, "7_1", 75, MAX_RESTARTS)


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("kinds", [[kind] for kind in CLASSES] + [AGAIN], ids="+".join)
def test_a_month_of_failures_ends_within_the_budget(tmp_path, monkeypatch, kinds, saves):
    monkeypatch.setenv("BAD_NODES", str(tmp_path / "bad_nodes.jsonl"))
    for number in range(1, 500):
        action = begin(tmp_path, "7", ["n1", "n2"], MAX_RESTARTS, {})[0]
        if action == "hold":
            break
        if action == "exclude":
            (tmp_path / "bad_nodes.jsonl").unlink()  # as if it had expired
            continue
        if saves:
            folder = tmp_path / "checkpoints" / f"step_{number:08d}"
            folder.mkdir(parents=True)
            (folder / "MANIFEST.json").touch()
        if CLASSES[kinds[number % len(kinds)]](tmp_path)[0] == "hold":
            break
        if saves and number > 3 * MAX_RESTARTS and set(kinds) <= STOPS:
            return  # a run that is stopped and has saved is never held
    # One start for each restart of the budget, and what of it was not counted as a failure.
    assert number <= (len(kinds) * (MAX_RESTARTS + 2) if saves else 12), number


STOPS = {"a stop before the first step", "a preemption before the first step", "a link of an array"}


def test_where_the_list_cannot_be_written_the_run_excludes_the_node_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BAD_NODES", "/dev/full")
    history.append(tmp_path, "begin", job="7", restart=0, nodes="n1 n2", checkpoint=None)
    action, reason = preflight(tmp_path, "7", ["n1", "n2"], bad_node(tmp_path), 1, MAX_RESTARTS)
    assert (action, reason) == ("exclude", "n1 n1: no GPU")
    assert "/dev/full cannot be written (No space left on device): only" in capsys.readouterr().err
    assert bad_nodes.current(tmp_path) == {"n1": "no GPU"}
    assert bad_nodes.current() == {}
    assert begin(tmp_path, "7", ["n1", "n2"], MAX_RESTARTS, {})[0] == "exclude"
    assert begin(tmp_path, "7", ["n2", "n3"], MAX_RESTARTS, {})[0] == "go"


def test_a_status_with_a_reason_has_precedence(tmp_path):
    assert final_status(137, tmp_path)[0] == 137
    (tmp_path / "rank_0").write_text("78\nConfigError: Invalid configuration (1 error):\n  - a: b\n")
    assert final_status(143, tmp_path) == (78, "ConfigError: Invalid configuration (1 error): - a: b")
    (tmp_path / "rank_0").write_text("75")  # written when all have saved
    assert final_status(137, tmp_path)[0] == 75
    assert final_status(0, None)[0] == 0


def ends(folder, *statuses):
    """Ranks that ended one after the other."""
    for number, (rank, status) in enumerate(zip(reversed(range(len(statuses))), statuses, strict=True)):
        path = folder / f"end_{rank}"
        path.write_text(f"{status}\n")
        os.utime(path, (1764000000 + number,) * 2)


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ((137, 75), 137),  # memory ran out while the other was being built, which was ended for it
        ((1, 143), 1),
        ((71, 75, 75), 71),
        ((75, 137), 75),  # asked to stop before it trained; the other sat in a collective until it was killed
        ((140, 140), 75),  # while Python was loading
        ((0, 134), 134),
        ((0, 0), 9),  # srun's own
    ],
)
def test_before_training_the_first_rank_to_end_gives_the_reason(tmp_path, statuses, status):
    ends(tmp_path, *statuses)
    assert final_status(9, tmp_path)[0] == status


def test_the_state_of_the_job_with_the_lock_is_queried(tmp_path, monkeypatch):
    monkeypatch.setenv("BAD_NODES", str(tmp_path / "bad_nodes.jsonl"))
    assert begin(tmp_path, "7", ["n1"], 9, {})[0] == "go"
    assert begin(tmp_path, "8", ["n2"], 9, {}) == ("ask", "7")
    assert begin(tmp_path, "8", ["n2"], 9, {"7": "COMPLETING"})[0] == "hold"
    assert begin(tmp_path, "8", ["n2"], 9, {"7": ""})[0] == "go"  # forgotten


def test_a_node_that_could_not_start_the_job_is_noted_after_another_could(tmp_path, monkeypatch):
    monkeypatch.setenv("BAD_NODES", str(tmp_path / "bad_nodes.jsonl"))
    assert begin(tmp_path, "7", ["n2"], 9, {}, "n1,n1,n2: status 127")[0] == "go"
    assert bad_nodes.current() == {"n1": "status 127"}
    assert history.excluded(tmp_path, "7") == ["n1"]


def test_an_end_that_slurm_has_already_decided_is_reported_as_such(tmp_path):
    history.append(tmp_path, "begin", job="7", restart=0, nodes="n1", checkpoint=None)
    action, reason = end(tmp_path, "7", 143, 9, state="COMPLETING")
    assert action == "left"
    assert reason == "status 143, no checkpoint yet; Slurm cancels or requeues the job (COMPLETING)"


@pytest.mark.parametrize(("event", "status", "action"), [("begin", 0, "hold"), ("end", 75, "hold"), ("end", 0, "done")])
def test_a_job_with_an_unwritable_folder_is_held(tmp_path, monkeypatch, capsys, event, status, action):
    (tmp_path / "file").write_text("")
    run = tmp_path / "file" / "run"
    monkeypatch.setenv("JOB", "7")
    monkeypatch.setattr("sys.argv", ["requeue_policy", event, "--run", str(run), "--status", str(status)])
    main()
    answer = capsys.readouterr().out
    assert answer.startswith(f"\nanswer: {action} {run}")
    assert answer.endswith(" cannot be written (Not a directory): check space, quota and permissions\n")


def test_the_reason_quotes_the_programs_error(tmp_path):
    history.append(tmp_path, "begin", job="7", restart=0, nodes="n1", checkpoint=None)
    assert end(tmp_path, "7", 78, 9, "ConfigError: a: b")[1].endswith("(status 78): ConfigError: a: b")


@pytest.mark.parametrize("state", ["RUNNING", "STOPPED", "SIGNALING", "RESIZING"])
def test_a_job_whose_script_runs_on_decides_and_has_its_folder(tmp_path, monkeypatch, state):
    monkeypatch.setenv("BAD_NODES", str(tmp_path / "bad_nodes.jsonl"))
    assert begin(tmp_path, "7", ["n1"], 9, {})[0] == "go"
    assert begin(tmp_path, "8", ["n2"], 9, {"7": state})[0] == "hold"
    assert end(tmp_path, "7", 75, 9, state=state)[0] == "requeue"


def test_a_program_that_ended_well_has_done_so_whatever_another_left(tmp_path):
    ends(tmp_path, 3)
    assert final_status(0, tmp_path) == (0, "")


def test_a_list_of_another_user_holds_no_job(tmp_path, monkeypatch, capsys):
    (tmp_path / "list").mkdir()  # cannot be read as a file
    monkeypatch.setenv("BAD_NODES", str(tmp_path / "list"))
    monkeypatch.setattr(bad_nodes, "read_records", unreadable(bad_nodes.read_records, tmp_path / "list"))
    assert begin(tmp_path, "7", ["n1"], 9, {})[0] == "go"
    assert "list cannot be read (Permission denied): its nodes are not excluded" in capsys.readouterr().err


def unreadable(read, path):
    def read_records(asked):
        if asked == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(asked)

    return read_records
