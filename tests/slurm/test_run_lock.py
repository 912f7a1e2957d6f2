"""One job at a time on a folder, however many begin at once."""

import errno
import os
import time
from pathlib import Path

import pytest

from slurm import history, run_lock
from tests.spawn import SERVER, start_process
from tests.waiting import PATIENCE_S, wait_for_end

# As many as there are cores, for all to be at it in the same microsecond.
_NUM_PROCESSES, _NUM_ROUNDS, _ROUND_S = 2, 200, 0.003


def race(number, folder, all_ready, start, won):
    """In each round all lock the same folder at the same instant; `dead` has it from before and is at work no more."""
    all_ready.wait()
    if number == 0:
        start.value = time.monotonic()
    all_ready.wait()
    for n in range(_NUM_ROUNDS):
        while time.monotonic() < start.value + n * _ROUND_S:
            pass
        other = run_lock.acquire(folder / f"run_{n}", str(number), 0, is_at_work=lambda job: job != "dead")
        won[number * _NUM_ROUNDS + n] = other is None


@pytest.mark.integration
@pytest.mark.parametrize("before", [None, "dead"])
def test_of_jobs_that_begin_at_the_same_instant_one_gets_the_lock(tmp_path, before):
    for n in range(_NUM_ROUNDS):
        (tmp_path / f"run_{n}" / "slurm" / "starts").mkdir(parents=True)
        if before:
            assert run_lock.acquire(tmp_path / f"run_{n}", before, 0, lambda job: True) is None
    all_ready = SERVER.Barrier(_NUM_PROCESSES, timeout=PATIENCE_S)
    start, won = SERVER.Value("d"), SERVER.Array("b", _NUM_PROCESSES * _NUM_ROUNDS)
    processes = [start_process(race, number, tmp_path, all_ready, start, won) for number in range(_NUM_PROCESSES)]
    for process in processes:
        wait_for_end(process, "a job")
        assert process.exitcode == 0
    assert [sum(won[n::_NUM_ROUNDS]) for n in range(_NUM_ROUNDS)] == [1] * _NUM_ROUNDS


def test_a_running_job_has_the_lock_until_its_start_has_ended(tmp_path):
    def at_work(job):
        return True

    assert run_lock.acquire(tmp_path, "1", 0, at_work) is None
    assert run_lock.acquire(tmp_path, "2", 0, at_work) == "1"
    history.append(tmp_path, "begin", job="1", restart=0, nodes="n1", checkpoint=None)
    assert run_lock.acquire(tmp_path, "2", 0, at_work) == "1"
    history.append(tmp_path, "end", job="1", status=75, action="requeue", reason="", checkpoint=None)
    # Its next start has it again: the end of the last one does not free it.
    assert run_lock.acquire(tmp_path, "1", 1, at_work) is None
    assert run_lock.acquire(tmp_path, "2", 0, at_work) == "1"
    assert run_lock.acquire(tmp_path, "1", 2, at_work) is None  # cut off, and started again
    assert run_lock.acquire(tmp_path, "2", 0, lambda job: False) is None


def test_the_lock_leaves_one_file(tmp_path):
    run_lock.acquire(tmp_path, "1", 0, lambda job: True)
    run_lock.acquire(tmp_path, "2", 0, lambda job: True)
    assert [path.name for path in (tmp_path / "slurm" / "starts").iterdir()] == ["000001"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links_has_locks_too(tmp_path, monkeypatch, number):
    def hardlink_to(path, target):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "hardlink_to", hardlink_to)
    assert run_lock.acquire(tmp_path, "1", 0, lambda job: True) is None
    assert run_lock.acquire(tmp_path, "2", 0, lambda job: True) == "1"
    assert run_lock.acquire(tmp_path, "2", 0, lambda job: False) is None
    assert run_lock.acquire(tmp_path, "3", 0, lambda job: True) == "2"


def test_a_start_that_was_killed_before_it_wrote_its_job_holds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_LOOK_S", 0.0)
    folder = tmp_path / "slurm" / "starts"
    folder.mkdir(parents=True)
    (folder / "000001").touch()
    assert run_lock.acquire(tmp_path, "2", 0, lambda job: True) is None
    assert run_lock.acquire(tmp_path, "3", 0, lambda job: True) == "2"


def test_containers_of_one_host_may_have_equal_process_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock.os, "getpid", lambda: 7)
    stock = Path.hardlink_to

    def hardlink_to(path, target):
        monkeypatch.setattr(Path, "hardlink_to", stock)
        assert run_lock.acquire(tmp_path, "2", 0, lambda job: True) is None  # another start comes first
        stock(path, target)

    monkeypatch.setattr(Path, "hardlink_to", hardlink_to)
    assert run_lock.acquire(tmp_path, "1", 0, lambda job: True) == "2"
