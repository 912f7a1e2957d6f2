"""Does cross-layer interaction help? A designed experiment: see `cross_layer_design.md`.

All variants of a seed get the same batches in the same order and, for parameters in common, the same initial values.
Each run is a process of one thread. A finished run is one line of the file of results, and is not done again: an
experiment that was stopped continues where it stopped, on another machine too once the file is committed.

Source: METER, arXiv 2111.02387 (in_layer); BridgeTower, arXiv 2206.08657 (bridge); arXiv 2305.13697 (cross_layer).
"""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import get_args

import torch

from benchmarks.report import ROOT, machine
from experiments.cross_layer_plan import (
    COMPARED,
    MOST_VARIANTS,
    Run,
    append_line,
    read_lines,
    seeds_of,
    settings_from,
)
from experiments.cross_layer_report import write_cross_layer
from experiments.data_sets import DataSet, Stage
from experiments.peer import PEER
from experiments.picture_retrieval import PictureRetrieval, PictureSettings
from experiments.toy_vqa import ToyVqa, ToyVqaSettings
from experiments.variants import VARIANTS, RunSettings
from unimo3.errors import CommandParser, ConfigError, DivergedError, exit_with_status

RESULTS = ROOT / "experiments" / "results"


def data_set_of(name: str, args: Namespace, settings: dict[str, RunSettings]) -> DataSet:
    """The data set of a name, in the work folder."""
    chosen = settings[name]
    if isinstance(chosen, PictureSettings):
        return PictureRetrieval(args.work, chosen)
    assert isinstance(chosen, ToyVqaSettings)
    return ToyVqa(args.work, chosen)


def do_one(run: Run, data_set: DataSet, results: Path) -> None:
    """Train and measure in this process, and append the line. A run that diverges has the metric of a guess."""
    started = time.perf_counter()
    try:
        measured = data_set.run(run.variant, run.seed, run.stage).to_line()
    except DivergedError as error:
        measured = {"diverged": str(error), "metrics": {data_set.primary: data_set.guess()}}
    identity = run.identity(data_set.settings) | {"data": data_set.digest()}
    append_line(
        results,
        identity | measured | {"seconds": round(time.perf_counter() - started, 1), "machine": machine()},
    )


def do_all(runs: Sequence[Run], args: Namespace, settings: dict[str, RunSettings]) -> Iterator[Run]:
    """Do the runs, `args.jobs` processes at a time, and yield each as it ends.

    Raises:
        RuntimeError: a process failed; the others are ended.
    """
    waiting = list(runs)
    running: dict[Run, subprocess.Popen] = {}
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                run = waiting.pop(0)
                running[run] = subprocess.Popen(
                    command_of(run, args, settings), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
                )
            for run, process in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    if process.returncode:
                        raise RuntimeError(f"{run} exited with status {process.returncode}")
                    yield run
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def command_of(run: Run, args: Namespace, settings: dict[str, RunSettings]) -> list[str]:
    """The command line of one run."""
    folders = ["--work", str(args.work), "--results", str(args.results)]
    changed = json.dumps({name: asdict(value) for name, value in settings.items()})
    words = [run.stage, "--data-sets", run.data_set, "--variants", run.variant, "--seeds", str(run.seed)]
    return [sys.executable, "-m", "experiments.cross_layer", *words, *folders, "--settings", changed, "--jobs", "0"]


def parse(argv: list[str] | None) -> Namespace:
    """Command line; see ``--help``.

    Raises:
        ConfigError: with all its errors.
    """
    parser = CommandParser(prog="python -m experiments.cross_layer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for stage in get_args(Stage):
        purpose = {"pilot": "runs that choose the settings and the number of seeds", "run": "the experiment's runs"}
        _add_run_options(commands.add_parser(stage, help=purpose[stage]), stage)
    report = commands.add_parser("report", help="tables, tests and gate maps of the finished runs")
    report.add_argument("--results", type=Path, default=RESULTS / "cross_layer.jsonl", help="of the runs")
    args = parser.parse_args(argv)
    if args.command == "report":
        return args
    known = (*VARIANTS, PEER)
    unknown = [name for name in args.variants if name not in known]
    errors = [f"--variants {name}: one of {', '.join(known)} is supported" for name in unknown]
    if PEER in args.variants and args.data_sets != [ToyVqa.name]:
        errors.append(f"--variants {PEER}: runs on {ToyVqa.name} alone; set --data-sets {ToyVqa.name}")
    if len({*args.variants}) != len(args.variants) or len(args.variants) > MOST_VARIANTS:
        errors.append(f"--variants {' '.join(args.variants)}: at most {MOST_VARIANTS} different ones are needed")
    seeds: list[int] = args.seeds or []
    if len({*seeds}) != len(seeds) or min(seeds, default=0) < 0:
        errors.append(f"--seeds {' '.join(map(str, seeds))}: different numbers of 0 or more are needed")
    if args.jobs < 0:
        errors.append(f"--jobs {args.jobs}: 1 or more is needed, or 0 for this process")
    if errors:
        raise ConfigError(errors)
    return args


def _add_run_options(parser: ArgumentParser, stage: Stage) -> None:
    names = [ToyVqa.name, PictureRetrieval.name]
    ranges = [f"{seeds[0]} to {seeds[-1]} of {name}" for name in names if (seeds := seeds_of(stage, name))]
    parser.add_argument("--data-sets", nargs="+", choices=names, default=names, help="default: both")
    parser.add_argument("--variants", nargs="+", default=list(COMPARED), help=f"default: {', '.join(COMPARED)}")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"default: {', '.join(ranges)}")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each of one thread; 0: this one (default: 2)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "cross_layer", help="folder of the data")
    parser.add_argument("--results", type=Path, default=RESULTS / "cross_layer.jsonl", help="gets a line for each run")
    parser.add_argument("--settings", help='JSON of changed settings, such as {"pictures": {"layers": 2}}')


def run_missing(args: Namespace, settings: dict[str, RunSettings]) -> None:
    """Make the data, and do the runs that the file of results does not have, seed by seed."""
    errors = [error for name in args.data_sets for error in settings[name].size_errors(args.variants)]
    if errors:
        raise ConfigError(errors)
    data_sets = {name: data_set_of(name, args, settings) for name in args.data_sets}
    for data_set in data_sets.values():
        data_set.make()
    lines = read_lines(args.results)
    seeds = {name: args.seeds or seeds_of(args.command, name) for name in data_sets}
    runs = [Run(args.command, name, *key) for name in data_sets for key in product(args.variants, seeds[name])]
    runs.sort(key=lambda run: run.seed)
    missing = [run for run in runs if not run.is_done(settings[run.data_set], lines)]
    if not args.jobs:
        torch.set_num_threads(1)
        for run in missing:
            do_one(run, data_sets[run.data_set], args.results)
        return
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them done before", flush=True)
    started = time.monotonic()
    for number, run in enumerate(do_all(missing, args, settings), start=1):
        left_min = (time.monotonic() - started) / number * (len(missing) - number) / 60
        done = f"{run.data_set} {run.variant} seed {run.seed} done"
        print(f"{done}; {len(missing) - number} runs to do, {left_min:.0f} min", flush=True)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Do the missing runs, or write the report of those that are done."""
    args = parse(argv)
    args.results = args.results.resolve()
    if args.command == "report":
        write_cross_layer(args.results)
        return
    args.work = args.work.resolve()
    if args.jobs:
        # A stop ends the runs too: they would continue unseen, and a second start would do them twice.
        for stop in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stop, lambda number, _: sys.exit(128 + number))
    run_missing(args, settings_from(args.settings))


if __name__ == "__main__":
    main()
