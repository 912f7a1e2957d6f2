"""One screen a run: ``python -m slurm.status [RUN...] [--json] [--watch]``; without RUN, every run below runs/.

``--html FILE`` writes a page with charts of one run.

A run whose first job is still pending is shown too, before it has a folder. Everything is read from files in the run's
folder and from Slurm; the run itself is not asked.

Source: squeue(1) for the job's state.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from slurm import bad_nodes, history, prometheus, squeue
from slurm.runs import read_newest_checkpoint
from unimo3.atomic_write import is_file_name
from unimo3.checkpoint.manifest import STATE
from unimo3.errors import CommandParser, ConfigError, exit_with_status
from unimo3.training.heartbeat import HEARTBEATS, heartbeat_interval_s, read_heartbeats, server_is_ahead_s
from unimo3.versions import check_version

_RECENT_STEPS = 20
_SILENT_S = 60.0
_CLOCKS_DIFFER_S = 60.0
_NUM_RESTARTS_SHOWN = 5
# Begins the comment of a job that the scripts hold, slurm/common.sh.
_HELD = "held: "


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see ``--help``."""
    parser = CommandParser(prog="python -m slurm.status", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs (default: those in runs/)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object a run, a line each")
    output.add_argument(
        "--prometheus",
        type=Path,
        metavar="FILE",
        help="write FILE atomically for the textfile collector of Prometheus' node-exporter, and print nothing",
    )
    output.add_argument(
        "--html", type=Path, metavar="FILE", help="write FILE: charts and a time line of one run; print nothing"
    )
    parser.add_argument("--watch", action="store_true", help="print again every few seconds, until Ctrl-C")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between updates (default: %(default)s)")
    return parser.parse_args(argv)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Print the state of runs."""
    args = parse_arguments(argv)
    queue = squeue.read_queue()
    runs = args.runs or _own_runs(queue)
    errors = [problem for run in runs for problem in _folder_errors(run, queue)]
    if not runs:
        jobs = queue.error or "no job waits for one"
        errors.append(f"no RUN is given, runs/ contains none and {jobs}; name the folder of a run")
    if args.html is not None and len(runs) > 1:
        errors.append(f"--html {args.html}: writes a page for one run, but {len(runs)} runs are given; give one RUN")
    if args.html is not None and not is_file_name(args.html):
        errors.append(f"--html {args.html}: cannot be written there; name a file in a folder that exists")
    if not args.every > 0:
        errors.append(f"--every {args.every}: a number of seconds above 0 is needed")
    if errors:
        raise ConfigError(errors)
    while True:
        states = [state_of(run, queue) for run in runs]
        if args.prometheus:
            prometheus.write(args.prometheus, states, len(bad_nodes.current()))
        elif args.html:
            from slurm import run_page  # the others need no charts

            (run,), (state,) = runs, states
            # A start that may be at work has no end yet.
            run_page.write(args.html, run, screen(state), is_running=len(state["restarts"]) < state["starts"])
        else:
            show(states, args)
        if not args.watch:
            return
        try:
            time.sleep(args.every)
        except KeyboardInterrupt:
            return
        queue = squeue.read_queue()


def show(states: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the states of runs."""
    text = "\n".join(json.dumps(state) for state in states) if args.json else "\n\n".join(map(screen, states))
    if args.watch and sys.stdout.isatty():
        print("\033[2J\033[H", end="")
    print(text, flush=True)


def _own_runs(queue: squeue.Queue) -> list[Path]:
    folder = Path("runs")
    waiting = {folder / one.folder.name for one in queue.jobs or [] if one.folder.parent == folder.resolve()}
    return sorted({path.parent for path in folder.glob("*/config.yaml")} | waiting)


def _folder_errors(run: Path, queue: squeue.Queue) -> list[str]:
    if run.is_dir():
        if (run / "config.yaml").exists() or (run / history.FOLDER).exists() or queue.has_job_on(run):
            return []
        return [f"{run}: is no run's folder, it has neither config.yaml nor slurm/, and no job is queued for it"]
    if queue.has_job_on(run):
        return []
    return [f"{run}: no such folder, and {queue.error or 'no job is queued for it'}; name the folder of a run"]


def state_of(run: Path, queue: squeue.Queue) -> dict[str, Any]:
    """All that is known of a run, as plain values; unknown values are None."""
    attempts = history.read(run)
    jobs = squeue.jobs_of(run, attempts, queue)
    steps = _records(run / "metrics.jsonl")
    last = steps[-1] if steps else {}
    num_steps = _num_steps(run)
    recent, before = steps[-_RECENT_STEPS:], steps[-2 * _RECENT_STEPS : -_RECENT_STEPS]
    step_s = median(record["step_s"] for record in recent) if recent else None
    state: dict[str, Any] = {
        "run": str(run),
        "jobs": [asdict(job) for job in jobs],
        "held": any(job.comment.startswith(_HELD) for job in jobs),
        "queue_error": queue.error,
        "step": last.get("step"),
        "steps": num_steps,
        "loss": last.get("loss"),
        "pairs_per_s": median(record["pairs_per_s"] for record in recent) if recent else None,
        "trend": None,
        "left_s": (num_steps - last["step"]) * step_s if steps and num_steps and step_s is not None else None,
        "skipped_steps": last.get("skipped_steps"),
        "checkpoint": _checkpoint(run),
        "skip": _skipped_data(run),
        "data_step": last.get("data_step"),
        "starts": len(attempts),
        "restarts": _ends(attempts, squeue.may_run(jobs, queue)),
        "stop": (run / "stop").exists(),
        "ranks": (ranks := _ranks(run, attempts[-1].time if attempts else 0.0)),
        "goes_on": (not jobs or squeue.may_run(jobs, queue)) and (ranks is None or not ranks["silent"]),
        "bad_nodes": bad_nodes.current(run),
    }
    if recent and before:
        state["trend"] = state["pairs_per_s"] / median(record["pairs_per_s"] for record in before) - 1
    return state


def screen(state: dict[str, Any]) -> str:
    """A run's state for people."""
    lines = [state["run"]]

    def line(name: str, text: str) -> None:
        lines.append(f"  {name:<11} {text}")

    for job in state["jobs"]:
        reason = f", {job['reason']}" if job["reason"] else ""
        line("job", f"{job['id']} {job['state']}{reason}" + (f" on {job['nodes']}" if job["nodes"] else ""))
        if job["comment"].startswith(_HELD):
            line("held for", job["comment"].removeprefix(_HELD))
        elif job["comment"]:
            line("comment", job["comment"])
    if state["stop"]:
        line("stop", f"{state['run']}/stop exists: every start saves and exits immediately; remove it to continue")
    if not state["jobs"]:
        line("job", state["queue_error"] or "no Slurm job is queued or has started for this run")
    if state["step"] is None:
        line("step", "none yet")
    else:
        fraction = f" of {state['steps']} ({100 * state['step'] / state['steps']:.1f} %)" if state["steps"] else ""
        line("step", f"{state['step']}{fraction}, loss {_number(state['loss'])}, skipped {state['skipped_steps'] or 0}")
        trend = f", {100 * state['trend']:+.0f} % against the {_RECENT_STEPS} before" if state["trend"] else ""
        line("speed", f"{_number(state['pairs_per_s'])} pairs/s{trend}")
        if state["left_s"] and state["goes_on"]:
            ends = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + state["left_s"]))
            line("ends", f"{ends} if it keeps running, in {_span(state['left_s'])}")
    if state["skip"] or state["data_step"] is not None:
        reads = f"step {state['step']} read the data of step {state['data_step']}" if state["data_step"] else ""
        line("data.skip", "; ".join(filter(None, (f"{state['skip']}" if state["skip"] else "", reads))))
    checkpoint = state["checkpoint"]
    line("checkpoint", f"step {checkpoint['step']}, {_span(checkpoint['age_s'])} old" if checkpoint else "none yet")
    line("starts", f"{state['starts'] or 'none by Slurm'}")
    for restart in state["restarts"][-_NUM_RESTARTS_SHOWN:]:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(restart["time"]))
        line("", f"{when}  {restart['action']}: {restart['reason']}")
    ranks = state["ranks"]
    if ranks:
        line(
            "ranks",
            f"{ranks['number']}: {', '.join(f'{number} in {phase}' for phase, number in ranks['phases'].items())}",
        )
        for silent in ranks["silent"]:
            line("", f"rank {silent['rank']} on {silent['host']} is silent for {_span(silent['silent_s'])}")
    for node, reason in state["bad_nodes"].items():
        line("bad node", f"{node}: {reason}")
    return "\n".join(lines)


def _ends(attempts: list[history.Attempt], may_run: bool) -> list[dict[str, Any]]:
    """How each start ended; a start without a recorded end was cut off, unless it may be the one that runs."""
    ends = []
    for index, attempt in enumerate(attempts):
        when, action, reason = attempt.ended, attempt.action, attempt.reason
        if action is None:
            if may_run and index == len(attempts) - 1:
                continue
            when, action, reason = attempt.time, "cut off", "after this start: a lost node, a kill, no time to save"
        ends.append({"time": when, "status": attempt.status, "action": action, "reason": reason})
    return ends


def _checkpoint(run: Path) -> dict[str, Any] | None:
    def of(step: int, manifest: Path) -> dict[str, Any]:
        age_s = time.time() + server_is_ahead_s(run / HEARTBEATS) - manifest.stat().st_mtime
        return {"step": step, "age_s": max(age_s, 0.0)}

    return read_newest_checkpoint(run, of)


def _ranks(run: Path, since: float) -> dict[str, Any] | None:
    """Summary of the ranks' last heartbeats, without those from before the last start, by its node's clock."""
    beats = [beat for beat in read_heartbeats(run) if beat.time >= since - _CLOCKS_DIFFER_S]
    if not beats:
        return None
    phases: dict[str, int] = {}
    for beat in beats:
        phases[beat.phase] = phases.get(beat.phase, 0) + 1
    now, silent_s = time.time(), _SILENT_S + heartbeat_interval_s(len(beats))
    silent = [
        {"rank": beat.rank, "host": beat.host, "silent_s": now - beat.time}
        for beat in beats
        if beat.phase != "ended" and now - beat.time > silent_s
    ]
    return {"number": len(beats), "phases": phases, "silent": silent}


def _skipped_data(run: Path) -> list[list[int]]:
    """``data.skip`` of the newest checkpoint's start, else of the first start; a later start's is not known yet."""

    def of(_: int, manifest: Path) -> Any:
        return json.loads(manifest.with_name(STATE).read_text())["extra"]["settings"]["data.skip"]

    try:
        skip = read_newest_checkpoint(run, of)
        if skip is None:
            skip = yaml.safe_load((run / "config.yaml").read_text())["data"]["skip"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return []
    return skip


def _num_steps(run: Path) -> int | None:
    try:
        content = yaml.safe_load((run / "config.yaml").read_text())
        return int(content["training"]["steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def _records(path: Path) -> list[dict[str, Any]]:
    """Training steps of the end of ``metrics.jsonl``; only the end is read, since a long run's file is large."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200_000))
        lines = file.read().decode(errors="replace").splitlines()
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut off at either end
        check_version(path, record)
        if isinstance(record, dict) and "group" not in record and "step_s" in record:
            records.append(record)
    return records


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _span(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    main()
