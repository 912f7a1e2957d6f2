"""Does cross-layer interaction help? Fusion encoders trained alike on toy data, pretraining and then VQA.

All variants of a seed get the same batches in the same order and, for parameters in common, the same initial values;
their sizes agree to 2 %, except for the one whose further levels have separate keys and values. Each (variant, seed) is
a process of one thread. A finished run is saved in the work folder and not done again, so an ablation that was killed
continues where it stopped.

Source: METER, arXiv 2111.02387 (in_layer); BridgeTower, arXiv 2206.08657 (bridge); arXiv 2305.13697 (cross_layer).
"""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from benchmarks.report import ROOT
from experiments.ablation_report import MOST_SEEDS, MOST_SIZE_DIFFERENCE, REFERENCE, write_ablation
from experiments.ablation_run import TrainingRun, num_parameters
from experiments.ablation_settings import LARGER_VARIANTS, VARIANTS, Data, Settings, option
from unimo3.errors import CommandParser, ConfigError, exit_with_status
from unimo3.model.unimo3 import Unimo3ForPreTraining

FULL = Settings()
QUICK = Settings(images=1000, pretraining_steps=20, vqa_steps=25, batch=32)


def check_sizes(settings: Settings) -> None:
    """Print each variant's parameters.

    Raises:
        ConfigError: one differs from in_layer's by more than 2 %, and is not expected to.
    """
    with torch.device("meta"):
        sizes = {name: num_parameters(Unimo3ForPreTraining(settings.model(name).to_config())) for name in VARIANTS}
    errors = []
    for name, size in sizes.items():
        excess = size / sizes[REFERENCE] - 1
        print(f"{name}: {size:,} parameters ({excess:+.2%})")
        if abs(excess) > MOST_SIZE_DIFFERENCE and name not in LARGER_VARIANTS:
            errors.append(
                f"--layers {settings.layers} --width {settings.width}: {name} has {excess:+.1%} parameters compared "
                f"with {REFERENCE}; sizes within {MOST_SIZE_DIFFERENCE:.0%} compare: use fewer layers or more width"
            )
    if errors:
        raise ConfigError(errors)


def do_all(runs: list[TrainingRun], work: Path, num_jobs: int) -> Iterator[TrainingRun]:
    """Do the runs that are missing, `num_jobs` processes at a time, and yield each as it ends.

    Raises:
        RuntimeError: a process failed; the others are ended.
    """
    waiting = list(runs)
    running: dict[TrainingRun, subprocess.Popen] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_jobs:
                run = waiting.pop(0)
                running[run] = subprocess.Popen(
                    command_of(run, work), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
                )
            for run, process in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    if process.returncode:
                        raise RuntimeError(f"{run.variant} seed {run.seed} exited with status {process.returncode}")
                    yield run
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def command_of(run: TrainingRun, work: Path) -> list[str]:
    """The command line of one run."""
    options = [word for name, value in asdict(run.settings).items() for word in (option(name), str(value))]
    only = ("--seeds", str(run.seed), "--only", f"{run.variant}:{run.seed}")
    return [sys.executable, "-m", "experiments.ablation", *only, "--work", str(work), *options]


def parse(argv: list[str] | None) -> tuple[Namespace, Settings]:
    """Command line; see ``--help``.

    Raises:
        ConfigError: with all its errors.
    """
    parser = CommandParser(prog="python -m experiments.ablation", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="all stages in minutes; too short to compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the repetitions (default: 0 1 2)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each of one thread (default: 2)")
    parser.add_argument("--work", type=Path, help="folder of data and finished runs (default: runs/ablation[_quick])")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results", help="folder of the report")
    parser.add_argument("--only", metavar="VARIANT:SEED", help="do this run alone, on data that is there; no report")
    for field in fields(Settings):
        full, quick = getattr(FULL, field.name), getattr(QUICK, field.name)
        parser.add_argument(option(field.name), type=type(full), help=f"default: {full}, with --quick {quick}")
    args = parser.parse_args(argv)
    base = QUICK if args.quick else FULL
    overrides = {field.name: getattr(args, field.name) for field in fields(Settings)}
    settings = replace(base, **{name: value for name, value in overrides.items() if value is not None})

    errors = settings.validate()
    unknown = [name for name in args.variants if name not in VARIANTS]
    errors += [f"--variants {name}: one of {', '.join(VARIANTS)} is supported" for name in unknown]
    if REFERENCE not in args.variants:
        errors.append(f"--variants {' '.join(args.variants)}: {REFERENCE}, which others are compared with, is missing")
    if not 1 <= len(set(args.seeds)) == len(args.seeds) <= MOST_SEEDS or min(args.seeds) < 0:
        errors.append(f"--seeds {args.seeds}: 1 to {MOST_SEEDS} different numbers of 0 or more are needed")
    if args.only and args.only not in (f"{variant}:{seed}" for variant in VARIANTS for seed in args.seeds):
        errors.append(
            f"--only {args.only}: a variant and one of --seeds is needed, such as {REFERENCE}:{args.seeds[0]}"
        )
    if args.jobs < 1:
        errors.append(f"--jobs {args.jobs}: at least 1 is needed")
    if errors:
        raise ConfigError(errors)
    return args, settings


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Do the missing runs of the ablation, then write its report."""
    args, settings = parse(argv)
    name = "ablation_quick" if args.quick else "ablation"
    work = (args.work or ROOT / "runs" / name).resolve()
    if args.only:
        # Ctrl-C reaches all processes of a terminal: the one that started this speaks for all.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        torch.set_num_threads(1)
        variant, seed = args.only.split(":")
        TrainingRun(settings, variant, int(seed)).do(work)
        return
    # A stop ends the runs too: they would continue unseen, and a second start would do them twice.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda number, _: sys.exit(128 + number))
    check_sizes(settings)
    data = Data(work, settings)
    data.make()
    runs = [TrainingRun(settings, variant, seed) for seed in args.seeds for variant in args.variants]
    missing = [run for run in runs if run.result(work) is None]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them done before", flush=True)
    started = time.monotonic()
    for number, run in enumerate(do_all(missing, work, args.jobs), start=1):
        left_min = (time.monotonic() - started) / number * (len(missing) - number) / 60
        print(f"{run.variant} seed {run.seed} done; {len(missing) - number} runs to do, {left_min:.0f} min", flush=True)
    results = [result for run in runs if (result := run.result(work)) is not None]
    write_ablation(args.out / f"{name}.md", results, data.blind(), is_quick=args.quick)


if __name__ == "__main__":
    main()
