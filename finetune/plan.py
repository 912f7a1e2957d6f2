"""What a fine-tuning recipe needs, before you request nodes: memory, micro-batch, ds_config, operations and hours.

Everything is computed from the task's model and loss without values; no GPU, no data and no weights are needed.
Hours are those of training: evaluation, of rows and by ranking, is not counted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.plan_settings import planned
from finetune.tasks import TASKS, config_class
from unimo3 import config
from unimo3.errors import ConfigError, exit_with_status
from unimo3.training.plan.command import machine_of, machine_parser, print_plan

if TYPE_CHECKING:
    from unimo3.training.plan.make import PlannedRun

_PROGRAM = "python -m finetune.plan"
_EPILOG = "All other arguments are those of finetune.TASK; python -m finetune.TASK --help lists them."


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Command line, and the settings on it; see ``--help``.

    Raises:
        ConfigError: no task, or an unknown one.
    """
    parser = machine_parser(f"{_PROGRAM} TASK", f"TASK is one of {', '.join(TASKS)}. {__doc__}", _EPILOG)
    parser.add_argument(
        "--model", metavar="RECIPE", help="pretraining recipe whose model is tuned, before there are weights for --init"
    )
    parser.add_argument(
        "--table",
        nargs="+",
        metavar="TASK=RECIPE",
        help="instead of TASK: print the table of what recipes need, each with its own ds_config or --ds-config",
    )
    # By hand: argparse takes the value of a setting that it does not know for the task.
    task = argv[0] if argv and not argv[0].startswith("-") else None
    args, rest = parser.parse_known_args(argv[task is not None :])
    args.task = task
    if args.model is not None:
        rest = [*rest, "--model_recipe", args.model]  # checked with the rest
    return args, rest


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Plan, and print it."""
    args, rest = parse_arguments(sys.argv[1:] if argv is None else argv)
    if args.table:
        print(table(args, rest))
        return
    if args.task is None:
        raise ConfigError(f"TASK: not given; name one of {', '.join(TASKS)} as the first argument")
    check_task(args.task)
    print_plan(args, rest, lambda settings: read_run(args.task, settings))


def table(args: argparse.Namespace, rest: list[str]) -> str:
    """See ``--table``.

    Raises:
        ConfigError: the arguments or a recipe are invalid.
    """
    if args.task is not None or args.json:
        option = "--json" if args.task is None else f"TASK '{args.task}'"
        raise ConfigError(f"{option}: a table names the task of each recipe, and is markdown; leave it or --table out")
    from unimo3.training.plan.make import make_plan
    from unimo3.training.plan.table import needs_table

    machine = machine_of(args)
    if args.ds_config is not None:
        rest = [*rest, "--training.ds_config", args.ds_config]
    plans = {}
    for entry in args.table:
        task, _, recipe = entry.partition("=")
        check_task(task)
        if not recipe:
            raise ConfigError(f"--table {entry}: names no recipe; use {task}=finetune/recipes/{task}_base.yaml")
        run = read_run(task, ["--config", recipe, *rest])
        plans[Path(recipe).stem] = make_plan(run, machine, run.training.ds_config, compares=False)
    return needs_table(plans)


def check_task(task: str) -> None:
    """Raises ConfigError if there is no such task."""
    if task not in TASKS:
        raise ConfigError(f"TASK '{task}': there is no such task; name one of {', '.join(TASKS)}")


def read_run(task: str, argv: list[str]) -> PlannedRun:
    """The run of a task that settings describe."""
    return config.parse(planned(config_class(task)), argv, f"{_PROGRAM} {task}", __doc__ or "").planned_run()


if __name__ == "__main__":
    main()
