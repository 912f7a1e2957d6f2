"""What a job does next, as ``ACTION REASON`` on one line; asked by the job scripts before and after the programs.

    go         continue
    done       the run has ended well
    link       this link of an array ends, the next goes on
    requeue    start again
    exclude    start again elsewhere; the reason begins with the nodes to leave out
    hold       keep the job, held, until somebody has mended what the reason says

    python -m slurm.outcome begin --run RUN --nodes LIST
    python -m slurm.outcome preflight --run RUN --nodes LIST --mark DIR --status N
    python -m slurm.outcome end --run RUN --status N --statuses DIR --ranks N

Without torch, and without anything of the project that needs it: this has to work where the rest does not.

Source: sysexits.h for the programs' statuses, unimo3/errors.py.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

from slurm import bad_nodes, history
from slurm.runs import newest_step

MAX_WITHOUT_PROGRESS = 3
DEFAULT_MAX_RESTARTS = 20
_REASONS = {
    78: "a setting, a file or a checkpoint has to be mended (status 78)",
    70: "the loss stayed not finite (status 70): start anew with a lower optim.lr under another run.name",
}


def decide(
    status: int, attempts: list[history.Attempt], checkpoint: int | None, max_restarts: int, in_array: bool
) -> tuple[str, str]:
    """Action and reason after a program has ended.

    Args:
        attempts: all starts, the one that has just ended last.
        checkpoint: newest step now.
    """
    if status == 0:
        return "done", "the program has ended well"
    if status == 75:
        return ("link" if in_array else "requeue"), f"asked to stop, saved at step {checkpoint}"
    if status in _REASONS:
        return "hold", _REASONS[status]
    return _again(f"status {status}", attempts, checkpoint, max_restarts)


def _again(what: str, attempts: list[history.Attempt], checkpoint: int | None, max_restarts: int) -> tuple[str, str]:
    """Requeue after a failure that is not the run's own, unless that has been tried too often."""
    in_vain = history.failures_without_progress(attempts, checkpoint)
    if in_vain > MAX_WITHOUT_PROGRESS:
        where = "any checkpoint" if checkpoint is None else f"a checkpoint newer than step {checkpoint}"
        return "hold", f"{what}: {in_vain} starts in a row ended without {where}"
    failed = sum(attempt.failed for attempt in attempts)
    if failed > max_restarts:
        return "hold", f"{what}: {failed} starts have failed, more than MAX_RESTARTS {max_restarts}"
    return "requeue", f"{what}: taken for a fault of the machines, start {len(attempts) + 1} follows"


def begin(run: Path, job: str, nodes: str, max_restarts: int) -> tuple[str, str]:
    """Before a program starts: whether it may; if so the start is noted."""
    if other := _other_job(run, job):
        return "hold", f"job {other} works on {run}; release this one when that has ended"
    listed = sorted(set(_expand(nodes)) & bad_nodes.current().keys())
    if listed:
        return "exclude", f"{','.join(sorted(bad_nodes.current()))} noted as bad: {bad_nodes.current()[listed[0]]}"
    before, checkpoint = history.read(run), newest_step(run)
    if before and before[-1].action is None:
        # Cut off: nobody was left to decide.
        action, reason = _again("the last start was cut off", before, checkpoint, max_restarts)
        if action == "hold" and before[-1].job == job:
            history.append(run, "end", job=job, status=-1, action=action, reason=reason, checkpoint=checkpoint)
            return action, reason
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0)
    history.append(run, "begin", job=job, restart=restart, nodes=nodes, checkpoint=checkpoint)
    return "go", ""


def settled_status(status: int, folder: Path | None, num_ranks: int) -> int:
    """The status that counts: srun's is the highest, and ranks that were ended for another's sake have high ones.

    Args:
        folder: where ranks that ended by themselves have left theirs.
    """
    told = [int(path.read_text() or status) for path in folder.glob("rank_*")] if folder else []
    for decisive in _REASONS:
        if decisive in told:
            return decisive
    return 75 if status and told == [75] * num_ranks else status


def end(run: Path, job: str, status: int, max_restarts: int) -> tuple[str, str]:
    """After a program has ended: what follows, which is noted."""
    checkpoint = newest_step(run)
    in_array = bool(os.environ.get("SLURM_ARRAY_JOB_ID"))
    attempts = history.read(run)
    if attempts:
        last = attempts[-1]
        attempts[-1] = history.Attempt(
            last.time, last.job, last.restart, last.nodes, last.checkpoint, status=status
        )  # fmt: skip
    action, reason = decide(status, attempts, checkpoint, max_restarts, in_array)
    history.append(run, "end", job=job, status=status, action=action, reason=reason, checkpoint=checkpoint)
    return action, reason


def preflight(run: Path, job: str, nodes: str, mark: Path, status: int) -> tuple[str, str]:
    """After the checks of the nodes: bad ones are noted, and the job goes elsewhere."""
    told = {path.stem: json.loads(path.read_text())["problems"] for path in sorted(mark.glob("*.json"))}
    network = told.pop("network", [])
    expected = _expand(nodes)
    bad = {node: "; ".join(told.get(node, ["gave no answer"])) for node in expected if told.get(node, ["none"])}
    if not bad and not network and status == 0:
        return "go", ""
    if not bad:
        reason = "; ".join(network) or f"the check of the network ended with status {status}"
        action, reason = _again(reason, history.read(run), newest_step(run), DEFAULT_MAX_RESTARTS)
    elif len(bad) == len(expected) > 1 or (len(expected) == 1 and not _elsewhere(expected)):
        # Where every node says so it is not the nodes.
        action, reason = "hold", f"every node: {next(iter(bad.values()))}"
    else:
        for node, problem in bad.items():
            bad_nodes.add(node, problem, job)
        action = "exclude"
        reason = f"{','.join(sorted(bad_nodes.current()))} failed before the start: " + "; ".join(
            f"{node}: {problem}" for node, problem in bad.items()
        )
    history.append(run, "end", job=job, status=-2, action=action, reason=reason, checkpoint=newest_step(run))
    return action, reason


def _other_job(run: Path, job: str) -> str | None:
    """Another job whose start on this run has not ended, if Slurm still runs it."""
    attempts = history.read(run)
    if not attempts or attempts[-1].action is not None or attempts[-1].job == job:
        return None
    return (
        attempts[-1].job
        if _slurm("squeue", "--noheader", f"--jobs={attempts[-1].job}", "--format=%T") == "RUNNING"
        else None
    )


def _elsewhere(nodes: list[str]) -> bool:
    """Whether the cluster has further nodes that are up."""
    return bool(set(_slurm("sinfo", "--noheader", "--responding", "--format=%n").split()) - set(nodes))


def _expand(nodes: str) -> list[str]:
    return _slurm("scontrol", "show", "hostnames", nodes).split()


def _slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m slurm.outcome", description=__doc__)
    parser.add_argument("event", choices=("begin", "preflight", "end"))
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--nodes", default="")
    parser.add_argument("--mark", type=Path)
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--statuses", type=Path, help="folder where ranks left theirs")
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args()
    job = os.environ["SLURM_JOB_ID"]
    max_restarts = int(os.environ.get("MAX_RESTARTS", "") or DEFAULT_MAX_RESTARTS)
    if args.event == "begin":
        action, reason = begin(args.run, job, args.nodes, max_restarts)
    elif args.event == "preflight":
        action, reason = preflight(args.run, job, args.nodes, args.mark, args.status)
    else:
        action, reason = end(args.run, job, settled_status(args.status, args.statuses, args.ranks), max_restarts)
    print(action, reason)


if __name__ == "__main__":
    main()
