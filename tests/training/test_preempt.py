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
from unimo3.training.preempt import StopListener

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_noted_once(number, tmp_path):
    before = {n: signal.getsignal(n) for n in STOP_SIGNALS}
    try:
        stop = StopListener().install()
        stop.watch(tmp_path)
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
    listener.watch(tmp_path)
    assert not listener.received
    (tmp_path / "requeue").touch()
    listener.look()
    assert listener.received


@pytest.mark.integration
def test_a_stop_signal_before_training_ends_the_process_with_status_75():
    program = (
        "import os, signal; from unimo3.training.preempt import StopListener; kept = StopListener().install(); "
        "os.kill(os.getpid(), signal.SIGUSR2); print('continues')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (EXIT_REQUEUE, "")
    assert "Interrupted: asked to stop (SIGUSR2) before training began, nothing is lost" in done.stderr
