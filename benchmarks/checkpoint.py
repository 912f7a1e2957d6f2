"""Checkpoints: export, resuming at another number of ranks, and how long a save blocks a step.

    export    pretrain.export against DeepSpeed's zero_to_torch (checkpoint_export.py)
    elastic   2 ranks' checkpoint resumed by 1: ours against ds_to_universal and load_universal (checkpoint_elastic.py)
    blocked   seconds for which a step waits for a save: background against plain (checkpoint_blocked.py)

Source: none.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks.checkpoint_blocked import blocked_table, measure_blocked
from benchmarks.checkpoint_elastic import elastic_table, measure_elastic
from benchmarks.checkpoint_engine import WIDTH
from benchmarks.checkpoint_export import Measured, check_equal, compare, shapes_of, table, write_checkpoint
from benchmarks.report import ROOT, write_report
from unimo3.errors import CommandParser, ConfigError, exit_with_status

TARGETS = "Targets: export at most 0.6 of the time and 600 MB; elastic at most 0.5 of the time; blocked at most 0.2."

Result = TypeVar("Result")


@exit_with_status
def main(arguments: list[str] | None = None) -> None:
    """Measure, write the result and print it."""
    parser = CommandParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--export", type=float, nargs="+", default=[0.3e9, 1e9], help="parameters (default: 0.3e9 1e9)")
    parser.add_argument("--elastic", type=float, nargs="+", default=[0.3e9, 1e9], help="the same")
    parser.add_argument(
        "--blocked", type=float, nargs="+", default=[0.3e9, 0.6e9], help="the same (default: 0.3e9 0.6e9)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for some 40 GB of files (default: the system's)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "checkpoint.md")
    args = parser.parse_args(arguments)
    layer = WIDTH * WIDTH
    errors = [
        f"--{name} {count:g}: at least {least:g} parameters are needed"
        for name, least in (("export", 1e6), ("elastic", layer), ("blocked", layer))
        for count in getattr(args, name)
        if not count >= least
    ]
    if args.rounds < 1:
        errors.append(f"--rounds {args.rounds}: at least 1 is needed")
    if errors:
        raise ConfigError(errors)

    def in_folder(measure: Callable[[Path], Result]) -> Result:
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            return measure(Path(work))

    def export(work: Path, count: int) -> dict[str, Measured]:
        write_checkpoint(work / "checkpoint", shapes_of(count), moments=False)
        check_equal(work / "checkpoint", work)
        return compare(work / "checkpoint", work, args.rounds)

    exports = {int(n): in_folder(lambda work, n=n: export(work, int(n))) for n in args.export}
    elastic = {int(n): in_folder(lambda work, n=n: measure_elastic(int(n), args.rounds, work)) for n in args.elastic}
    blocked = {int(n): in_folder(lambda work, n=n: measure_blocked(int(n), args.rounds, work)) for n in args.blocked}
    text = "\n\n".join(
        [
            "## Export",
            table(exports),
            "Half precision, files in the page cache; peaks are of the complete process tree, imports included.",
            "## Another number of ranks",
            elastic_table(elastic),
            "## How long a save blocks a step",
            *(blocked_table(count, saves) for count, saves in blocked.items()),
            TARGETS,
        ]
    )
    write_report(args.out, "Checkpoints", text)
    print(f"\n{text}\n\n{args.out}")


if __name__ == "__main__":
    main()
