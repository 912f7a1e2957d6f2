"""The end of a process without progress, and who is named for it."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.waiting import output_of, text_of, wait_for
from unimo3.errors import EXIT_STALLED, ConfigError
from unimo3.training import heartbeat, watch
from unimo3.training.heartbeat import (
    Heartbeat,
    describe_suspects,
    heartbeat_interval_s,
    poll_interval_s,
    read_heartbeats,
)

ROOT = Path(__file__).parents[2]
STUCK = """
import logging, os, sys, time
from pathlib import Path
from unimo3.training import watch
logging.basicConfig()
watch._REPORTING_S = float(os.environ.get("REPORTING_S", "60"))
rank_watch = watch.Watch(Path(sys.argv[1]), float(sys.argv[2]), lambda: None)
rank_watch.beat(sys.argv[3], 5)
while sys.argv[4:] and not Path(sys.argv[4]).exists():
    rank_watch.beat(sys.argv[3], 5)
    time.sleep(0.05)
real_time = time.time
time.time = lambda: real_time() + 5000  # somebody sets the clock
def stuck_here():
    while True:
        time.sleep(60)  # the test or the watch ends it
stuck_here()
"""


def beat(rank, phase, beats, since_s, silent_s=0.0):
    now = time.time()
    return Heartbeat(rank, "node", 10**7 + rank, 2, phase, beats, now - since_s, now - silent_s)


def named(*beats, started_s=100.0, num_ranks=2):
    return describe_suspects(list(beats), num_ranks, time.time() - started_s, silent_s=4.0)


def test_the_rank_with_the_fewest_phases_is_named():
    text = named(beat(0, "data", 7, since_s=5.0), beat(1, "wait", 8, since_s=5.5))
    assert re.fullmatch(r"rank 0 on node \(pid 10000000\) in phase 'data' of step 2 for \d+ s", text)


def test_a_silent_rank_is_named_before_one_that_is_behind():
    assert named(beat(0, "data", 7, 5.0), beat(1, "wait", 8, 5.5, silent_s=9.0)).startswith("rank 1 on node")


def test_a_rank_seen_only_in_an_earlier_start_has_not_come():
    text = named(beat(0, "join", 0, 5.0), beat(1, "compute", 70, 905.0, silent_s=900.0))
    assert text == "rank 1, which has written no heartbeat since this start"


def test_of_many_a_few_are_named_and_the_others_counted():
    text = named(*(beat(rank, "wait", 3, 5.0) for rank in range(9)), num_ranks=9)
    assert "rank 3 on node" in text
    assert text.endswith(" and 5 more")


@pytest.fixture
def stuck(tmp_path):
    """Start a process that makes no progress; return its status and what it printed."""

    def start(*arguments, **environment):
        process = subprocess.Popen(
            [sys.executable, "-c", STUCK, str(tmp_path / "run"), *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    processes = []
    yield start
    for process in processes:
        process.kill()
        process.wait()


def wait_for_heartbeat(run):
    wait_for((run / "heartbeats" / "rank_00000.json").exists, "the first heartbeat")


@pytest.mark.integration
def test_a_rank_that_waits_for_one_that_never_came_reports_it(stuck, tmp_path):
    process = stuck("0.3", "join", RANK="0", WORLD_SIZE="2")
    _, printed = output_of(process, "the process that is stuck")
    assert process.returncode == EXIT_STALLED
    assert "the others wait for rank 1, which has written no heartbeat since this start" in printed
    assert "stuck_here" in (tmp_path / "run" / "stacks" / "rank_00000.txt").read_text()


# Opening a pipe that nobody reads hangs like a mount without its server.
@pytest.mark.integration
def test_a_heartbeat_that_hangs_stops_no_watch(stuck, tmp_path):
    (tmp_path / "run" / "heartbeats").mkdir(parents=True)
    os.mkfifo(tmp_path / "run" / "heartbeats" / "rank_00000.json.tmp")
    process = stuck("0.5", "compute")
    _, printed = output_of(process, "the process that is stuck")
    assert process.returncode == EXIT_STALLED
    assert "no progress for 0.5 s" in printed


@pytest.mark.integration
def test_a_folder_that_hangs_for_the_stacks_too_is_named(stuck, tmp_path):
    process = stuck("2", "compute", str(tmp_path / "hangs"), REPORTING_S="1")
    wait_for_heartbeat(tmp_path / "run")
    os.mkfifo(tmp_path / "run" / "stacks" / "rank_00000.txt")
    (tmp_path / "hangs").touch()
    _, printed = output_of(process, "the process that is stuck")
    assert process.returncode == EXIT_STALLED
    assert "in phase 'compute' of step 5, and" in printed
    assert "does not answer" in printed
    assert "stuck_here" in printed


@pytest.mark.integration
def test_sigquit_writes_the_stacks_and_ends_nothing(stuck, tmp_path):
    process = stuck("900", "compute")
    wait_for_heartbeat(tmp_path / "run")
    # The watch has looked at the clock that was set, too.
    noted = tmp_path / "run" / "heartbeats" / "rank_00000.json"
    wait_for(lambda: json.loads(noted.read_text())["time"] > time.time() + 4000, "a heartbeat by the new clock")
    last = read_heartbeats(tmp_path / "run")[0].time
    assert last < time.time() + 4000  # by this process's clock
    wait_for(lambda: read_heartbeats(tmp_path / "run")[0].time > last + 1.5, "two more")
    assert not (tmp_path / "run" / "stacks" / "rank_00000.txt").exists()  # it has not given up
    stacks = text_of(tmp_path / "run" / "stacks" / "asked_00000.txt")

    def ask():
        process.send_signal(signal.SIGQUIT)  # one that comes before the file is open goes to the output
        return "stuck_here" in stacks()

    wait_for(ask, "the stacks", stacks, poll_s=0.2)
    assert process.poll() is None
    printed = stacks()
    assert printed.startswith(f"rank 0 on {socket.gethostname()}, pid {process.pid}\n")
    assert "stuck_here" in printed


@pytest.mark.parametrize("rank", [0, 5])
def test_of_many_ranks_only_the_first_writes_at_each_poll(rank, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "1024")
    monkeypatch.setattr(watch, "poll_interval_s", lambda num_ranks: 0.01)
    written = []
    monkeypatch.setattr(watch, "write_heartbeat", lambda *arguments: written.append(arguments))
    polls = []
    rank_watch = watch.Watch(tmp_path, 900.0, lambda: polls.append(len(written)))
    wait_for(lambda: len(polls) >= 20, "polls")
    rank_watch.close()
    assert polls[:20] == (list(range(2, 22)) if rank == 0 else [1] * 20)


def test_heartbeats_of_1024_ranks_are_at_most_4_operations_a_minute():
    assert [heartbeat_interval_s(size) for size in (1, 2, 13)] == [1.0] * 3
    assert 4 * 60 / heartbeat_interval_s(1024) <= 4
    assert max(poll_interval_s(size) for size in (1, 200, 1024, 100_000)) == 5.0  # a stop file is seen soon


def test_a_process_reads_no_heartbeat_but_that_of_its_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    (tmp_path / "heartbeats").mkdir()
    for rank in (2, 3):
        path = tmp_path / "heartbeats" / f"rank_0000{rank}.json"
        path.write_text(json.dumps(vars(beat(rank, "compute", 9, since_s=5.0))))
    opened = []
    monkeypatch.setattr(heartbeat.json, "load", lambda file, load=json.load: opened.append(file.name) or load(file))
    other = heartbeat.other_process(tmp_path)
    assert other is not None
    assert other.rank == 3
    assert opened == [str(tmp_path / "heartbeats" / "rank_00003.json")]


LOCKS = """
import fcntl, sys
file = open(sys.argv[1], "a")
file.write("pid 7 on n1")
file.flush()
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.integration
def test_a_locked_run_is_refused_and_a_job_waits_for_its_lock(tmp_path, monkeypatch):
    path = tmp_path / "heartbeats" / "rank_00000.lock"  # without a heartbeat, as when both have just started
    path.parent.mkdir()
    command = [sys.executable, "-c", LOCKS, str(path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    monkeypatch.delenv("UNIMO3_STATUS_DIR", raising=False)
    with pytest.raises(ConfigError, match="pid 7 on n1 uses this run"):
        heartbeat.lock_run(tmp_path)
    monkeypatch.setenv("UNIMO3_STATUS_DIR", str(tmp_path))
    monkeypatch.setattr(heartbeat.time, "sleep", lambda _: other.communicate())  # the wait ends the other process
    heartbeat.lock_run(tmp_path)
    assert other.returncode == 0
    assert path.read_text() == f"pid {os.getpid()} on {socket.gethostname()}\n"


@pytest.mark.parametrize("is_slurm", [False, True])
def test_heartbeats_alone_protect_a_run_where_nothing_can_be_locked(tmp_path, monkeypatch, is_slurm):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(heartbeat.fcntl, "lockf", lockf)
    monkeypatch.delenv("UNIMO3_STATUS_DIR", raising=False)
    if is_slurm:
        monkeypatch.setenv("UNIMO3_STATUS_DIR", str(tmp_path))
        monkeypatch.setattr(heartbeat, "_LOCK_WAIT_S", 0.0)
    path = tmp_path / "heartbeats" / "rank_00000.json"
    path.parent.mkdir()
    path.write_text(json.dumps(vars(beat(0, "compute", 9, since_s=5.0))))
    with pytest.raises(ConfigError, match="uses this run"):
        heartbeat.lock_run(tmp_path)
    if is_slurm:  # after the loss of a node
        monkeypatch.setattr(heartbeat, "_LOCK_WAIT_S", 60.0)
        monkeypatch.setattr(heartbeat.time, "sleep", lambda _: path.unlink())
        heartbeat.lock_run(tmp_path)


@pytest.mark.parametrize("ahead_s", [3600, -3600])
def test_a_heartbeat_of_another_host_is_recent_by_its_servers_clock(tmp_path, monkeypatch, ahead_s):
    path = tmp_path / "heartbeats" / "rank_00000.json"
    path.parent.mkdir()
    path.write_text(json.dumps(vars(beat(0, "compute", 9, since_s=5.0))))
    monkeypatch.setattr(heartbeat.time, "time", lambda stock=time.time: stock() + ahead_s)  # of this host
    other = heartbeat.other_process(tmp_path)
    assert other is not None
    assert abs(other.time - other.since - 5.0) < 0.1
    os.utime(path, (path.stat().st_mtime - 60,) * 2)
    assert heartbeat.other_process(tmp_path) is None
