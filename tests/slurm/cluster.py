"""A Slurm of its own on this host: munged, slurmctld and several slurmd in a private folder, with own key and ports.

Source: Slurm's slurm.conf(5) and quickstart for administrators; munged(8).
"""

import getpass
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from tests.spawn import WORKER
from tests.waiting import PATIENCE_S, wait_for
from unimo3.launch import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")

CONF = """ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={cred_expire_s}
CryptoType=crypto/munge
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=100000
KillWait=60
BatchStartTimeout=300
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout={slurmd_timeout_s}
# A busy machine's daemons may answer late.
MessageTimeout=60
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
"""


def missing_programs() -> list[str]:
    """Which of Slurm's and munge's programs this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class Cluster:
    """Two or more nodes on this host; start it with `start`, end it with `stop`.

    Args:
        folder: a private one, for everything.
        nodes: their names.
        slurmd_timeout_s: Slurm's SlurmdTimeout: a node that does not answer for so long is DOWN. The default outlasts
            any pause of a busy machine; use `lose_node` not to wait for it.
        cred_expire_s: lifetime of job step credentials. A requeued job waits for so long; a step that a busy machine
            starts later fails.
    """

    def __init__(
        self,
        folder: Path,
        nodes: tuple[str, ...] = ("n1", "n2", "n3"),
        slurmd_timeout_s: int = 300,
        cred_expire_s: int = 15,
    ):
        self.folder, self.nodes = folder, nodes
        self._timings = {"slurmd_timeout_s": slurmd_timeout_s, "cred_expire_s": cred_expire_s}
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self.environment = {
            name: value
            for name, value in self.environment.items()
            if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SBATCH_"))
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir(exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        lines = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 RealMemory=4000 "
            f"Gres=gpu:2 Weight={number}"  # a job gets the first nodes that are free
            for number, name in enumerate(self.nodes, 1)
        ]
        listed = ",".join(self.nodes)
        lines += [
            f"PartitionName=low Nodes={listed} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 "
            "PreemptMode=REQUEUE GraceTime=600",
            f"PartitionName=high Nodes={listed} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off",
            f"PartitionName=shared Nodes={listed} MaxTime=INFINITE State=UP PriorityTier=1 OverSubscribe=FORCE:16",
        ]
        host = subprocess.run(["hostname", "-s"], check=True, capture_output=True, text=True).stdout.strip()
        # Jobs of two clusters on this host meet at different ports: those follow from the jobs' numbers.
        head = CONF.format(
            folder=self.folder,
            port=free_port(),
            first_job=1 + 1000 * WORKER,
            user=getpass.getuser(),
            host=host,
            **self._timings,
        )
        (self.folder / "slurm.conf").write_text(head + "\n".join(lines) + "\n")
        # In the place of GPUs: Slurm gives them to tasks, which see their numbers in CUDA_VISIBLE_DEVICES.
        for number, device in enumerate(("null", "zero")):
            (self.folder / f"gpu{number}").symlink_to(f"/dev/{device}")
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        files = {
            kind: f"--{kind}={self.folder}/munge.{kind.split('-')[0]}" for kind in ("socket", "pid-file", "log-file")
        }
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--seed-file={self.folder}/munge.seed",
            *files.values(),
        )
        self.wait(lambda: (self.folder / "munge.socket").exists(), "munged's socket")
        self._daemon("slurmctld", "-D", "-i")
        for name in self.nodes:
            self.start_node(name)
        self.wait(lambda: self.node_states() == dict.fromkeys(self.nodes, "idle"), "idle nodes")

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        self._daemon(name, "-D", "-N", name, program="slurmd")

    def lose_node(self, name: str) -> None:
        """End a node as `kill_node` does, and mark it DOWN as slurmctld does after SlurmdTimeout."""
        self.kill_node(name)
        self.call("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=power failure")

    def kill_node(self, name: str) -> None:
        """End a node's slurmd and all processes of its jobs, as a power failure does."""
        daemon = self._processes.pop(name)
        # Its steps' daemons and their tasks are in sessions of their own; they name the node in their command or
        # their environment.
        mark = f"SLURMD_NODENAME={name}\0".encode()
        conf = f"SLURM_CONF={self.folder / 'slurm.conf'}\0".encode()
        to_delete = [daemon.pid]
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue
            is_step = command.startswith(b"slurmstepd") and self._runs_on(int(entry.name), name)
            if is_step or (mark in environment and conf in environment):
                to_delete.append(int(entry.name))
        for process in to_delete:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        daemon.wait()

    def _runs_on(self, process: int, name: str) -> bool:
        parent = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
        return parent == self._processes.get(name, _NOBODY).pid or str(self.folder / f"spool.{name}") in str(
            Path(f"/proc/{process}/cwd").resolve()
        )

    def stop(self) -> None:
        """Cancel all jobs and end all daemons."""
        try:
            self.call("scancel", "--user", getpass.getuser(), check=False)
            self.wait(lambda: not self.call("squeue", "--noheader", "--format=%i", check=False).strip(), "no jobs")
        finally:
            for daemon in reversed(list(self._processes.values())):
                daemon.terminate()
            for daemon in self._processes.values():
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def call(self, *command: object, check: bool = True, **options) -> str:
        """Run one of Slurm's commands; its standard output."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            **options,
        )
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def node_states(self) -> dict[str, str]:
        """Each node's state, such as ``idle``; with ``*`` it does not answer."""
        lines = self.call("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %t", check=False).split("\n")
        return dict(line.split() for line in lines if line.strip())

    def job(self, number: int) -> dict[str, str]:
        """What ``scontrol show job`` prints of a job."""
        printed = self.call("scontrol", "show", "job", number, "--oneliner")
        return dict(re.findall(r"(?:^|\s)([A-Za-z/:]+)=(.*?)(?=\s[A-Za-z/:]+=|\s*$)", printed))

    def signalled(self, number: int, signal_number: int) -> float | None:
        """When Slurm has sent a signal to a job's ranks first, by its nodes' logs; seconds since 1970."""
        pattern = re.compile(rf"^\[(\S+?)\].* Sent signal {signal_number} to StepId={number}\.\d", re.MULTILINE)
        times = [time for path in self.folder.glob("slurmd.*.log") for time in pattern.findall(path.read_text())]
        return min((datetime.fromisoformat(one).timestamp() for one in times), default=None)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Poll until a condition is true."""
        wait_for(condition, what, self._logs, poll_s=0.1)

    def _logs(self) -> str:
        return "\n".join(f"{p.name}:\n{p.read_text()[-700:]}" for p in sorted(self.folder.glob("*.log")))

    def _daemon(self, name: str, *arguments: str, program: str = "") -> None:
        log = (self.folder / f"{name}.out").open("ab")
        command = [shutil.which(program or name, path=_path()) or name, *arguments]
        self._processes[name] = subprocess.Popen(
            command,
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        log.close()


class _Nobody:
    pid = -1


_NOBODY = _Nobody()
