"""The local launcher: environment, statuses and signals reach where they should; errors have their exit status."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unimo3 import apex
from unimo3.errors import CheckpointError, ConfigError, DataError, DivergedError, Interrupted, exit_with_status

ROOT = Path(__file__).parents[1]

RANK = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
assert os.environ["LOCAL_RANK"] == str(rank) and os.environ["WORLD_SIZE"] == "3" and os.environ["MASTER_PORT"]
{body}
"""


def launch(tmp_path, body, *arguments, **options):
    (tmp_path / "program.py").write_text(RANK.format(body=body))
    return subprocess.Popen(
        [sys.executable, "-m", "unimo3.launch", "-n", "3", "--grace", "1", *arguments, "program", "--flag", "x"],
        cwd=ROOT, env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_all_ranks_done_is_status_0_and_arguments_arrive(tmp_path):
    process = launch(tmp_path, "print(rank, sys.argv[1:])")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert sorted(output.splitlines()) == [f"{rank} ['--flag', 'x']" for rank in range(3)]


def test_the_first_failures_status_is_the_launchers_and_no_rank_stays_behind(tmp_path):
    start = time.monotonic()
    process = launch(tmp_path, "sys.exit(78) if rank == 1 else time.sleep(60)")
    process.communicate(timeout=60)
    assert process.returncode == 78
    assert time.monotonic() - start < 30


def test_a_signal_reaches_every_rank_and_they_may_take_their_time(tmp_path):
    body = """
def stop(number, frame):
    time.sleep(1.5)
    os.write(1, b"saved %d\\n" % rank)  # the handler may interrupt a print, which cannot be entered twice
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
os.write(1, b"ready\\n")
time.sleep(60)
"""
    process = launch(tmp_path, body, "--grace", "5")
    for _ in range(3):
        assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert sorted(output.splitlines()) == ["saved 0", "saved 1", "saved 2"]


def test_sigquit_has_every_rank_write_its_stacks_and_ends_none(tmp_path):
    body = f"""
import faulthandler
stacks = open(f"{tmp_path}/stacks_{{rank}}", "w")  # one file would have the lines of all mixed
faulthandler.register(signal.SIGQUIT, stacks)
os.write(1, b"ready\\n")
def stuck_here():
    time.sleep(60)
stuck_here()
"""
    process = launch(tmp_path, body)
    for _ in range(3):
        assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGQUIT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert all("in stuck_here" in (tmp_path / f"stacks_{rank}").read_text() for rank in range(3))


@pytest.mark.parametrize(("sent", "got"), [(signal.SIGINT, "SIGINT"), (signal.SIGHUP, "SIGTERM")])
def test_what_a_terminal_sends_to_all_reaches_each_rank_once(tmp_path, sent, got):
    body = """
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: got.append(signal.Signals(number).name))
os.write(1, b"ready\\n")
while not got:
    time.sleep(0.1)
time.sleep(0.5)
os.write(1, f"{got}\\n".encode())
"""
    # Whoever runs the tests under nohup has the signal ignored, and passes that on.
    process = launch(
        tmp_path, body, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    )
    for _ in range(3):
        assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, sent)
    output, _ = process.communicate(timeout=60)
    assert output.splitlines() == [f"['{got}']"] * 3


def test_a_program_that_does_not_exist_is_a_bad_setting():
    command = [sys.executable, "-m", "unimo3.launch", "-n", "0", "pretrain.trainn"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 78
    assert process.stderr.startswith("ConfigError: 2 settings to mend:\n  - --num-ranks 0: at least 1 is needed\n")
    assert "module pretrain.trainn: Python finds no such program" in process.stderr


def test_a_killed_rank_is_128_plus_its_signal(tmp_path):
    process = launch(tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 137
    assert said == "rank 1 was ended by SIGKILL; the kernel does that when memory runs out, see dmesg\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError(["a: 1: mend"]), 78),
        (DataError("b"), 78),
        (CheckpointError("c"), 78),
        (DivergedError("d"), 70),
        (Interrupted("e"), 75),
        (None, 0),
    ],
)
def test_every_error_has_its_exit_status_and_one_message(error, status, capfd):
    def main():
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as end:
        exit_with_status(main)()
    assert end.value.code == status
    written = capfd.readouterr().err
    assert written == (f"{type(error).__name__}: {error}\n" if error else "")


@pytest.mark.parametrize(("error", "is_said"), [(ConfigError("a"), False), (DataError("b"), True)])
def test_what_all_ranks_find_is_said_once_a_host(error, is_said, capfd, monkeypatch):
    def main():
        raise error

    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        exit_with_status(main)()
    assert bool(capfd.readouterr().err) == is_said


def test_a_package_named_apex_that_is_not_nvidias_is_noticed(tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(tmp_path)
    assert not apex.wrong_apex_installed()
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    apex.warn_of_wrong_apex()
    assert "not NVIDIA's" in caplog.text
    (tmp_path / "apex" / "optimizers").mkdir()
    assert not apex.wrong_apex_installed()
