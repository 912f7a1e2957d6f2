"""What a stop signal does before training and in it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unimo3.errors import EXIT_REQUEUE
from unimo3.launch import STOP_SIGNALS
from unimo3.training import preempt
from unimo3.training.preempt import StopListener, StopRequested

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_noted_once(number, tmp_path):
    before = {n: signal.getsignal(n) for n in STOP_SIGNALS}
    try:
        stop = StopListener().install()
        stop.watch_folder(tmp_path)
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received
        assert stop.name == signal.Signals(number).name
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_a_stop_file_counts_if_this_hosts_clock_is_ahead_of_the_servers(tmp_path, monkeypatch):
    monkeypatch.setattr(preempt.time, "time", lambda ahead=time.time: ahead() + 60)
    (tmp_path / "requeue").touch()
    os.utime(tmp_path / "requeue", (0, 0))  # of an earlier start
    listener = StopListener()
    listener.watch_folder(tmp_path)
    assert not listener.received
    (tmp_path / "requeue").touch()
    listener.poll_files()
    assert listener.received


def test_ranks_but_the_first_look_for_files_only_in_a_long_wait_for_data(tmp_path, monkeypatch):
    monkeypatch.setattr(preempt, "world", lambda: (1, 1024))
    listener = StopListener()
    (tmp_path / "stop").touch()
    listener.watch_folder(tmp_path)
    for _ in range(3):
        with listener.interruptible():
            listener.poll_files()  # a short wait for data in each step
        listener.poll_files()
    assert not listener.received
    with pytest.raises(StopRequested), listener.interruptible():
        listener.poll_files()
        assert not listener.received
        listener.poll_files()
        with listener.interruptible():
            pass  # raises what has been requested
    assert listener.received


@pytest.mark.parametrize("corrected_s", [-1200, 1200])
def test_a_stop_file_counts_after_the_clock_was_corrected(tmp_path, monkeypatch, corrected_s):
    monkeypatch.setattr(preempt.time, "time", lambda stock=time.time: stock() - corrected_s)
    listener, earlier = StopListener(), StopListener()
    monkeypatch.undo()  # while the model was being built
    (tmp_path / "requeue").touch()
    os.utime(tmp_path / "requeue", (time.time() + 1,) * 2)  # dates of files are a few milliseconds behind
    listener.watch_folder(tmp_path)
    assert listener.received
    os.utime(tmp_path / "requeue", (time.time() - 600,) * 2)
    earlier.watch_folder(tmp_path)
    assert not earlier.received


def test_a_touch_requests_a_profile_once_however_often_traces_are_written(tmp_path):
    path, listener = tmp_path / "profile", StopListener()

    def is_requested():
        listener.poll_files()
        return listener.wants_profile

    listener.watch_folder(tmp_path)
    assert not is_requested()
    path.touch()
    assert is_requested()
    listener.prepare_profile(7)
    assert not is_requested()
    (path / "step_00000007" / "rank_00001.json.gz").touch()
    assert not is_requested()
    path.touch()  # the folder, which may be as old as the clock of files is coarse
    os.utime(path, (time.time() + 1, time.time() + 1))
    assert is_requested()
    listener.prepare_profile(11)
    assert not is_requested()
    # A later start finds the folder, which asks for nothing.
    later = StopListener()
    later.watch_folder(tmp_path)
    assert not later.wants_profile
    assert not listener.received


@pytest.mark.integration
def test_a_stop_signal_before_training_ends_the_process_with_status_75():
    program = (
        "import os, signal; from unimo3.training.preempt import StopListener; listener = StopListener().install(); "
        "os.kill(os.getpid(), signal.SIGUSR2); print('continues')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (EXIT_REQUEUE, "")
    assert "Interrupted: asked to stop (SIGUSR2) before training began, nothing is lost" in done.stderr
