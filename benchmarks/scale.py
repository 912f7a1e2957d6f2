"""What grows with the number of ranks or samples, measured with at most two processes.

    elastic    a checkpoint of 512 ranks opened by 384: seconds and opens of one rank (scale_checkpoint.py)
    commit     a checkpoint of 2,048 files: its manifest, and the verification that ranks divide (scale_checkpoint.py)
    run        operations of a training run on its folder, a rank and minute, as of 1,024 ranks (scale_run.py)
    job        checks and decisions of a job of 256 nodes (scale_job.py)
    index      an index of 2 x 10^9 samples: seconds, memory and seeks of a reader (scale_data.py)
    network    bytes and seconds of a step between ranks, as the planner adds them to its hours (unimo3/training/plan)

Each part replaces its section of the result when it ends.

Source: none.
"""

import re
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.report import ROOT, write_report
from benchmarks.scale_checkpoint import commit_table, elastic_plan_table, measure_commit, measure_elastic_plan
from benchmarks.scale_data import data_table, measure_data
from benchmarks.scale_job import job_table, measure_job
from benchmarks.scale_network import network_table
from benchmarks.scale_run import measure_run, run_table
from unimo3.errors import CommandParser, ConfigError, exit_with_status

_SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
_LAST = "Measured on"


@exit_with_status
def main(arguments: list[str] | None = None) -> None:
    """Measure part by part, and write each result when it is known."""
    parser = CommandParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--before", type=int, default=512, help="ranks that wrote a checkpoint (default: %(default)s)")
    parser.add_argument("--after", type=int, default=384, help="ranks that open it (default: %(default)s)")
    parser.add_argument("--parameters", type=float, default=0.33e9, help="of its model (default: %(default)g)")
    parser.add_argument("--files", type=int, default=2048, help="of the committed checkpoint (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1024, help="whose intervals a run has (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training that count (default: %(default)g)")
    parser.add_argument("--nodes", type=int, default=256, help="of the job (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for some 200 MB of files with holes (default: the system's)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "scale.md")
    # A part is an entry here: its section's title, and what measures it in a folder of its own.
    parts: dict[str, tuple[str, Callable[[Path], str]]] = {
        "elastic": (
            "Opening a checkpoint at another number of ranks",
            lambda work: elastic_plan_table(
                args.before, args.after, measure_elastic_plan(int(args.parameters), args.before, args.after, work)
            ),
        ),
        "commit": (
            "Committing and verifying a checkpoint of many files",
            lambda work: commit_table(args.files, measure_commit(args.files, work)),
        ),
        "run": (
            "Operations of a run on its folder",
            lambda work: run_table(args.ranks, measure_run(args.ranks, args.minutes, work)),
        ),
        "job": ("A job of many nodes", lambda work: job_table(args.nodes, measure_job(args.nodes, work))),
        "index": ("An index of many samples", lambda work: data_table(measure_data(work))),
        "network": ("Bytes of a step between ranks", lambda _: network_table()),
    }
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts), help="measure these (default: all)")
    args = parser.parse_args(arguments)
    if errors := [
        f"--{name} {value:g}: at least {least:g} is needed"
        for name, least in (("before", 2), ("after", 2), ("parameters", 1e6), ("ranks", 2), ("nodes", 1))
        if not (value := getattr(args, name)) >= least
    ]:
        raise ConfigError(errors)
    if args.files < 6 or args.files % 2:
        raise ConfigError(f"--files {args.files}: an even number of at least 6 is needed")
    if not args.minutes > 0:
        raise ConfigError(f"--minutes {args.minutes:g}: more than 0 is needed")
    for name in args.part:
        title, measure = parts[name]
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            text = measure(Path(work))
        print(f"## {title}\n\n{text}\n", flush=True)
        _write_section(args.out, title, f"{text}\n\nMeasured {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.")


def _write_section(out: Path, title: str, text: str) -> None:
    """Replace a section of the result, or add it before the last one, which `write_report` writes."""
    sections = {}
    if out.exists():
        _, *pieces = _SECTION.split(out.read_text())
        sections = {name: body.strip() for name, body in zip(pieces[::2], pieces[1::2], strict=True)}
    sections.pop(_LAST, None)
    sections[title] = text
    write_report(out, "What grows with the number of ranks", "\n\n".join(f"## {n}\n\n{t}" for n, t in sections.items()))


if __name__ == "__main__":
    main()
