"""The local launcher: environment, statuses and signals reach where they should; errors have their exit status."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from tests.waiting import PATIENCE_S, hang, output_of, text_of, wait_for
from unimo3 import apex
from unimo3.errors import CheckpointError, ConfigError, DataError, DivergedError, Interrupted, exit_with_status
from unimo3.launch import free_port

ROOT = Path(__file__).parents[1]

RANK = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
assert os.environ["LOCAL_RANK"] == str(rank) and os.environ["WORLD_SIZE"] == "3" and os.environ["MASTER_PORT"]
assert "TORCHELASTIC_USE_AGENT_STORE" not in os.environ  # torch would wait for a store that only torchrun starts
{body}
"""
FAILS_ON_RANK_1 = "if rank == 1:\n    {}\nsignal.pause()"


def test_no_outgoing_connection_takes_the_port_before_rank_0_listens():
    ports = [free_port() for _ in range(200)]
    assert max(ports) < 32768  # Linux's default
    # Launchers that start at once get different ones.
    assert len(set(ports)) > 150


def launch(tmp_path, body, *arguments, **options):
    (tmp_path / "program.py").write_text(RANK.format(body=body))
    return subprocess.Popen(
        [sys.executable, "-m", "unimo3.launch", "-n", "3", "--grace", "1", *arguments, "program", "--flag", "x"],
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def read_lines(process, expected):
    """One line from each rank."""
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout.readline() for _ in range(3)), daemon=True)
    reader.start()
    reader.join(PATIENCE_S)
    if reader.is_alive():
        process.kill()
        pytest.fail(hang(f"a line {expected!r} from each rank", ""))
    assert lines == [f"{expected}\n"] * 3


@pytest.mark.integration
def test_all_ranks_done_is_status_0_and_arguments_arrive(tmp_path):
    process = launch(tmp_path, "print(rank, sys.argv[1:])")
    output, _ = output_of(process, "the launcher")
    assert process.returncode == 0
    assert sorted(output.splitlines()) == [f"{rank} ['--flag', 'x']" for rank in range(3)]


@pytest.mark.integration
def test_the_launcher_ends_with_the_first_failures_status_and_no_rank(tmp_path):
    (tmp_path / "ranks").mkdir()
    body = f"""
open("{tmp_path}/ranks/%d" % os.getpid(), "w").close()
while rank == 1 and len(os.listdir("{tmp_path}/ranks")) < 3:
    time.sleep(0.01)  # between two looks
"""
    process = launch(tmp_path, body + FAILS_ON_RANK_1.format("sys.exit(78)"))
    output_of(process, "the launcher")
    assert process.returncode == 78
    ranks = [int(path.name) for path in (tmp_path / "ranks").iterdir()]
    assert len(ranks) == 3
    assert not any(map(psutil.pid_exists, ranks))


@pytest.mark.integration
def test_a_later_status_with_a_reason_has_precedence(tmp_path):
    body = f"""
if rank == 1:
    open("{tmp_path}/crashes", "w").close()
    os.kill(os.getpid(), signal.SIGSEGV)
while not os.path.exists("{tmp_path}/crashes"):
    time.sleep(0.01)  # between two looks
time.sleep(0.3)  # the launcher has most often seen the crash by then
sys.exit(71)
"""
    process = launch(tmp_path, body, "--grace", str(PATIENCE_S))
    _, printed = output_of(process, "the launcher")
    assert process.returncode == 71
    assert "rank 1 was ended by SIGSEGV" in printed


@pytest.mark.integration
def test_a_signal_reaches_every_rank_and_the_launcher_waits(tmp_path):
    body = f"""
def stop(number, frame):
    os.write(1, b"saving\\n")  # the handler may interrupt a print, which cannot be entered twice
    while not os.path.exists("{tmp_path}/saved"):
        time.sleep(0.01)
    os.write(1, b"saved %d\\n" % rank)
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
os.write(1, b"ready\\n")
signal.pause()
"""
    process = launch(tmp_path, body, "--grace", str(PATIENCE_S))
    read_lines(process, "ready")
    process.send_signal(signal.SIGUSR1)
    read_lines(process, "saving")
    assert process.poll() is None
    (tmp_path / "saved").touch()
    output, _ = output_of(process, "the launcher")
    assert process.returncode == 75
    assert sorted(output.splitlines()) == ["saved 0", "saved 1", "saved 2"]


@pytest.mark.integration
def test_sigquit_has_every_rank_write_its_stacks_and_ends_none(tmp_path):
    body = f"""
import faulthandler
stacks = open(f"{tmp_path}/stacks_{{rank}}", "w")  # one file would have the lines of all mixed
faulthandler.register(signal.SIGQUIT, stacks)
def stuck_here():
    os.write(1, b"ready\\n")
    while True:
        signal.pause()
stuck_here()
"""
    process = launch(tmp_path, body)
    read_lines(process, "ready")
    process.send_signal(signal.SIGQUIT)
    for rank in range(3):
        stacks = text_of(tmp_path / f"stacks_{rank}")
        wait_for(lambda stacks=stacks: "in stuck_here" in stacks(), f"the stacks of rank {rank}", stacks)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output_of(process, "the launcher")


@pytest.mark.integration
@pytest.mark.parametrize(("sent", "got"), [(signal.SIGINT, "SIGINT"), (signal.SIGHUP, "SIGTERM")])
def test_a_terminals_signal_reaches_each_rank_once(tmp_path, sent, got):
    body = """
got = []
is_over = []
def note(number, frame):
    got.append(signal.Signals(number).name)
    os.write(1, b"got\\n")
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, note)
signal.signal(signal.SIGUSR2, lambda number, frame: is_over.append(number))
os.write(1, b"ready\\n")
while not is_over:
    time.sleep(0.01)  # between two looks
os.write(1, f"{got}\\n".encode())
"""
    # Whoever runs the tests under nohup has the signal ignored, and passes that on.
    process = launch(
        tmp_path, body, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    )
    read_lines(process, "ready")
    os.killpg(process.pid, sent)
    read_lines(process, "got")
    # The launcher passes signals on in their order: a second one would come before this.
    process.send_signal(signal.SIGUSR2)
    output, _ = output_of(process, "the launcher")
    assert output.splitlines() == [f"['{got}']"] * 3


@pytest.mark.integration
def test_a_program_that_does_not_exist_is_a_bad_setting():
    command = [sys.executable, "-m", "unimo3.launch", "-n", "0", "pretrain.trainn"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 78
    assert process.stderr.startswith("ConfigError: Invalid configuration (2 errors):\n  - --num-ranks 0: at least 1 is")
    assert "module pretrain.trainn: Python finds no such program" in process.stderr


@pytest.mark.integration
def test_a_killed_rank_is_128_plus_its_signal(tmp_path):
    process = launch(tmp_path, FAILS_ON_RANK_1.format("os.kill(os.getpid(), signal.SIGKILL)"))
    _, printed = output_of(process, "the launcher")
    assert process.returncode == 137
    assert printed == "rank 1 was ended by SIGKILL; the kernel does that when memory runs out, see dmesg\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError(["a: 1: fix"]), 78),
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


def caused_by(error, cause):
    error.__cause__ = cause
    return error


FULL, STALE = (OSError(number, os.strerror(number), "f") for number in (errno.ENOSPC, errno.ESTALE))


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (FULL, 78, "ConfigError: Invalid configuration (1 error):\n  - [Errno 28] No space left on device: 'f'; free"),
        (OSError(errno.EMFILE, "Too many open files"), 78, "raise ulimit -n, or lower data.num_workers"),
        (
            RuntimeError("Caught\n  File a\nRuntimeError: shm </a>: No space left on device (28)\n"),
            78,
            "- RuntimeError: shm",
        ),
        (RuntimeError("can't start new thread"), 78, "- can't start new thread; raise ulimit -u"),
        (STALE, 1, "UnreachableError: [Errno 116] Stale file handle: 'f'; check the server or the mount"),
        (caused_by(DataError("x.tar: cannot be read"), STALE), 1, "UnreachableError: x.tar: cannot be read\n"),
        (caused_by(CheckpointError("no state"), caused_by(ValueError(), STALE)), 1, "UnreachableError: no state\n"),
        (caused_by(CheckpointError("no state"), FULL), 78, "CheckpointError: no state\n"),
    ],
)
def test_a_disk_a_limit_or_a_mount_is_one_message_of_every_rank(error, status, message, capfd, monkeypatch):
    def main():
        raise error

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")  # another rank may have no such error
    with pytest.raises(SystemExit) as end:
        exit_with_status(main)()
    assert end.value.code == status
    assert message in capfd.readouterr().err


@pytest.mark.integration
def test_output_that_cannot_be_written_hides_no_exit_status():
    program = (
        "import sys; from unimo3.errors import ConfigError, exit_with_status\n"
        "def main():\n    if sys.argv[1] == 'fail': raise ConfigError('a')\n    print('output', flush=True)\n"
        "exit_with_status(main)()\n"
    )

    def status_of(how, redirection):
        command = ["bash", "-c", f'"$0" -c "$1" {how} {redirection}', sys.executable, program]
        environment = os.environ | {"PYTHONUNBUFFERED": ""}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode

    for redirection in (">&-", "2>&-", ">&- 2>&-", "2>/dev/full", ">/dev/full 2>/dev/full"):
        assert status_of("fail", redirection) == 78, redirection
    for redirection in (">&-", "2>/dev/full", "2>&-"):
        assert status_of("succeed", redirection) == 0, redirection
    assert status_of("succeed", ">/dev/full") == 1  # its result is lost
    assert status_of("succeed", "| (exec <&-; sleep 1); exit ${PIPESTATUS[0]}") in (0, 141)  # by who is faster


@pytest.mark.parametrize(("error", "is_printed"), [(ConfigError("a"), False), (DataError("b"), True)])
def test_an_error_of_all_ranks_is_printed_once_a_host(error, is_printed, capfd, monkeypatch):
    def main():
        raise error

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        exit_with_status(main)()
    assert bool(capfd.readouterr().err) == is_printed


def test_a_package_named_apex_that_is_not_nvidias_is_noticed(tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(tmp_path)
    assert not apex.wrong_apex_installed()
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    apex.warn_of_wrong_apex()
    assert "not NVIDIA's" in caplog.text
    (tmp_path / "apex" / "optimizers").mkdir()
    assert not apex.wrong_apex_installed()
