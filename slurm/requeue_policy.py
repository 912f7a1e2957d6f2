"""What a job does next, as ``answer: ACTION REASON``; asked by the job scripts before and after the programs.

    go         continue
    ask        ask again with the state that Slurm reports of another job; the reason is its number
    done       the program exited with status 0
    link       this link of an array ends, the next continues
    requeue    start again
    exclude    start again elsewhere; the reason begins with the nodes to exclude
    left       Slurm ends or requeues the job by itself
    hold       hold the job until somebody has fixed what the reason names

    python -m slurm.requeue_policy begin --run RUN --nodes 'NODE NODE...'
    python -m slurm.requeue_policy preflight --run RUN --nodes 'NODE NODE...' --results DIR --status N
    python -m slurm.requeue_policy end --run RUN --status N [--statuses DIR]

Without torch, and without anything of the project that needs it: this has to work where the rest does not.

Source: sysexits.h for the programs' statuses, unimo3/errors.py.
"""

import argparse
import errno
import json
import os
import signal
from pathlib import Path

from slurm import bad_nodes, history, run_lock, squeue
from slurm.commands import print_answer
from slurm.runs import progress
from unimo3.errors import ConfigError

# Starts in a row without a new checkpoint: the limits after failures and after stop requests, such as preemptions.
MAX_WITHOUT_PROGRESS, MAX_STOPS_WITHOUT_PROGRESS = 3, 10
MAX_EXCLUDES = 5
DEFAULT_MAX_RESTARTS = 20
_MESSAGE_CHARACTERS = 300
_ASKED_TO_STOP = (75, *(128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)))
# Errors of the run's folder that no restart repairs.
_FIXED_BY_PEOPLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
_REASONS = {
    78: "a setting, a file or a checkpoint has to be fixed (status 78)",
    70: "the loss remained non-finite (status 70): start a new run with a lower optim.lr and another run.name",
}


def decide(
    status: int, attempts: list[history.Attempt], checkpoint: int | None, max_restarts: int, in_array: bool
) -> tuple[str, str]:
    """Action and reason after a program has ended.

    Args:
        attempts: all starts, the one that has just ended last.
        checkpoint: newest step now; of a conversion, finished shards.
    """
    if status == 0:
        return "done", "the program exited with status 0"
    if status == 75:
        num_without_progress = history.starts_without_progress(history.since_the_last_hold(attempts), checkpoint)
        if num_without_progress > MAX_STOPS_WITHOUT_PROGRESS:
            reason = f"{num_without_progress} stop requests in a row without a new checkpoint; raise --time or --grace"
            return "hold", reason
        return ("link" if in_array else "requeue"), f"stop requested; {_newest(checkpoint)}"
    if status in _REASONS:
        return "hold", _REASONS[status]
    return _retry(f"status {status}", attempts, checkpoint, max_restarts)


def _newest(checkpoint: int | None) -> str:
    return "no checkpoint yet" if checkpoint is None else f"newest checkpoint: step {checkpoint}"


def _retry(what: str, attempts: list[history.Attempt], checkpoint: int | None, max_restarts: int) -> tuple[str, str]:
    """Requeue after a failure that the run did not cause, unless that has been tried too often."""
    attempts = history.since_the_last_hold(attempts)
    num_without_progress = history.starts_without_progress(attempts, checkpoint)
    if num_without_progress > MAX_WITHOUT_PROGRESS:
        return "hold", f"{what}: {num_without_progress} starts in a row made no progress"
    failed = sum(attempt.failed for attempt in attempts)
    if failed > max_restarts:
        return "hold", f"{what}: {failed} starts have failed, more than MAX_RESTARTS {max_restarts}"
    return "requeue", f"{what}: an infrastructure failure; requeued as start {len(attempts) + 1}"


def begin(
    run: Path, job: str, hosts: list[str], max_restarts: int, known: dict[str, str], early: str = ""
) -> tuple[str, str]:
    """Before a program starts: whether it may; if so the start is noted.

    Args:
        known: states of other jobs, as Slurm reports them. If the needed job is missing, the action is ``ask``.
        early: ``NODES: REASON``, where the job's last starts could not begin.
    """
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0)
    try:
        other = run_lock.acquire(run, job, restart, lambda other: known[other] in squeue.AT_WORK)
    except KeyError as unknown:
        return "ask", str(unknown.args[0])
    if other:
        return "hold", f"job {other} uses {run}; release this job when job {other} has ended"
    nodes, _, why = early.partition(": ")
    for node in sorted(set(nodes.split(",")) - {"", *hosts}):
        bad_nodes.add(run, node, why, job)
        history.append(run, "exclude", job=job, nodes=sorted({*history.excluded(run, job), node}))
    attempts, checkpoint = history.read(run), progress(run)
    action, reason = "go", ""
    num_without_progress = history.starts_without_progress(history.since_the_last_hold(attempts), checkpoint)
    bad = bad_nodes.current(run)
    if num_without_progress > MAX_STOPS_WITHOUT_PROGRESS:
        action = "hold"
        reason = (
            f"{num_without_progress} starts in a row ended without a new checkpoint, failures and stop requests "
            "counted together"
        )
    elif listed := sorted(set(hosts) & bad.keys()):
        action, reason = _exclude_nodes(run, f"{','.join(listed)} is listed as a bad node: {bad[listed[0]]}", attempts)
    elif attempts and attempts[-1].action is None:
        # Cut off: no process remained to decide.
        action, reason = _retry("the last start was cut off", attempts, checkpoint, max_restarts)
        action = "go" if action == "requeue" else action
    history.append(run, "begin", job=job, restart=restart, nodes=" ".join(hosts), checkpoint=checkpoint)
    if action != "go":
        history.append(run, "end", job=job, status=-1, action=action, reason=reason, checkpoint=checkpoint)
    return action, reason


def _exclude_nodes(run: Path, why: str, attempts: list[history.Attempt]) -> tuple[str, str]:
    """Requeue without the bad nodes. After several times in a row, hold: the job may ask for a bad node itself."""
    last = [attempt.action for attempt in attempts[-MAX_EXCLUDES:]]
    if last == ["exclude"] * MAX_EXCLUDES:
        return (
            "hold",
            f"{why}; requeued on other nodes {MAX_EXCLUDES} times in a row: check slurm/bad_nodes.jsonl and the nodes "
            "that the job requests",
        )
    return "exclude", f"{','.join(sorted(bad_nodes.current(run)))} {why}"


def final_status(status: int, folder: Path | None) -> tuple[int, str]:
    """The status that counts, and what a rank reported of it.

    srun's status is the highest of all ranks', and ranks that were ended because another failed have high ones.

    Args:
        folder: status files of the ranks that ended by themselves.
    """
    messages: dict[int, str] = {}
    for path in sorted(folder.glob("rank_*")) if folder else []:
        code, _, message = path.read_text().partition("\n")
        if code.isdigit() and not messages.get(int(code)):
            messages[int(code)] = " ".join(message.split())
    for decisive in (*_REASONS, 71):
        if decisive in messages:
            return decisive, messages[decisive]
    # A rank reports 75 only when all have saved together; srun may have ended the others a moment too early.
    if 75 in messages:
        return 75, ""
    # The first rank that ended knows why; the others were ended by srun. One that was asked to stop before it trained
    # reports 75 here and nothing else, or is ended by the signal while its program is still loading.
    # The order is that of the file server's clock: the nodes' own clocks differ.
    in_order = sorted(folder.glob("end_*"), key=lambda path: path.stat().st_mtime_ns) if folder else []
    codes = [path.read_text().strip() for path in in_order]
    first = next((int(code) for code in codes if status and code.isdigit() and int(code)), status)
    return (75, "") if first in _ASKED_TO_STOP else (first, messages.get(first, ""))


def end(
    run: Path, job: str, status: int, max_restarts: int, message: str = "", state: str = "RUNNING"
) -> tuple[str, str]:
    """After a program has ended: what follows, which is noted.

    Args:
        message: what the program reported of it.
        state: of the job; in another one Slurm ends or requeues it by itself.
    """
    checkpoint = progress(run)
    task, last_task = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ.get("SLURM_ARRAY_TASK_MAX")
    in_array = task is not None and task != last_task  # the last link has nobody after it
    attempts = history.read(run)
    if attempts:
        last = attempts[-1]
        attempts[-1] = history.Attempt(last.time, last.job, last.restart, last.nodes, last.checkpoint, status=status)
    action, reason = decide(status, attempts, checkpoint, max_restarts, in_array)
    if state not in squeue.RUNNING and action != "done":
        action, reason = "left", f"status {status}, {_newest(checkpoint)}; Slurm cancels or requeues the job ({state})"
    elif message:
        reason = f"{reason}: {message[:_MESSAGE_CHARACTERS]}"
    history.append(run, "end", job=job, status=status, action=action, reason=reason, checkpoint=checkpoint)
    return action, reason


def preflight(run: Path, job: str, hosts: list[str], results: Path, status: int, max_restarts: int) -> tuple[str, str]:
    """After the checks of the nodes: bad ones are noted, and the job goes elsewhere."""
    answers = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    measured = answers.pop("network", {"problems": [], "nodes": {}})
    network = measured["problems"]
    of_job = list(dict.fromkeys(problem for one in (*answers.values(), measured) for problem in one.get("job", [])))
    bad = {
        host: "; ".join(answers[host]["problems"]) if host in answers else "gave no answer"
        for host in hosts
        if host not in answers or answers[host]["problems"]
    } | measured["nodes"]
    if not bad and not network and not of_job and status == 0:
        return "go", ""
    checkpoint, attempts = progress(run), history.read(run)
    if of_job:
        action, reason = "hold", "; ".join(of_job)
    elif not answers or not bad:
        # Nobody answered, as when the job is being ended; or the network is slow and no node more than the others.
        what = "; ".join(network) or f"the checks of the nodes exited with status {status}"
        action, reason = _retry(what, attempts, checkpoint, max_restarts)
    elif len(bad) == len(hosts) > 1:
        # A problem that every node reports is not one of the nodes.
        action, reason = "hold", "every node: " + "; ".join(f"{host}: {problem}" for host, problem in bad.items())
    else:
        for host, problem in bad.items():
            bad_nodes.add(run, host, problem, job)
        action, reason = _exclude_nodes(
            run, "; ".join(f"{host}: {problem}" for host, problem in bad.items()), attempts[:-1]
        )
    history.append(run, "end", job=job, status=-2, action=action, reason=reason, checkpoint=checkpoint)
    return action, reason


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m slurm.requeue_policy", description=__doc__)
    parser.add_argument("event", choices=("begin", "preflight", "end"))
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--nodes", default="")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--statuses", type=Path, help="folder of the ranks' status files")
    parser.add_argument(
        "--known", default="", metavar="JOB=STATE", help="what Slurm reports of the job that was asked for"
    )
    parser.add_argument("--state", default="RUNNING", help="of the job, as Slurm reports it")
    parser.add_argument("--early", default="", metavar="NODES: REASON", help="where the job could not begin before")
    args = parser.parse_args()
    try:
        action, reason = _decision(args)
    except ConfigError as error:
        action, reason = "hold", "; ".join(error.errors)
    except OSError as error:
        if error.errno not in _FIXED_BY_PEOPLE:
            raise
        action = "done" if (args.event, args.status) == ("end", 0) else "hold"
        name = error.filename or args.run
        reason = f"{name} cannot be written ({error.strerror}): check space, quota and permissions"
    print_answer(action, reason)


def _decision(args: argparse.Namespace) -> tuple[str, str]:
    job = os.environ.get("JOB") or os.environ["SLURM_JOB_ID"]
    hosts = args.nodes.split()
    max_restarts = int(os.environ.get("MAX_RESTARTS", "") or DEFAULT_MAX_RESTARTS)
    if args.event == "begin":
        known = dict([args.known.split("=", 1)]) if args.known else {}
        return begin(args.run, job, hosts, max_restarts, known, args.early)
    if args.event == "preflight":
        return preflight(args.run, job, hosts, args.results, args.status, max_restarts)
    status, message = final_status(args.status, args.statuses)
    return end(args.run, job, status, max_restarts, message, args.state)


if __name__ == "__main__":
    main()
