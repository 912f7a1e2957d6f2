"""Checks a job, then submits it: ``python -m slurm.submit [OPTIONS] JOB ARGUMENTS...``.

JOB is pretrain, finetune (ARGUMENTS: the task, then as in training), export or prepare_shards; ARGUMENTS are those of
the program. The checks run before a node is allocated, and all errors are in one message: what the program itself would
refuse, for every number of nodes; disk for what it writes; grace period and wall time against what the run has
measured; another job, queued or at work, on the same folder. Then sbatch gets the same script and arguments as a user
would give it.

Source: sbatch(1).
"""

import argparse
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from slurm import bad_nodes, history, squeue
from slurm.bad_nodes import choose, expand
from slurm.commands import job_environment
from slurm.resources import cpu_job_errors, training_resources
from slurm.runs import ArgumentError, missing_program, work_folder
from slurm.site_config import Site, option_of, read_site, site_file
from slurm.squeue import jobs_on
from slurm.submit_checks import check_export, check_shards, check_training
from unimo3.errors import CommandParser, ConfigError, exit_with_status
from unimo3.project_files import package_folder

SCRIPTS = package_folder("slurm")
TRAINING = ("pretrain", "finetune")
# Kinds of dependency that wait for a job's end; `after` waits for its start alone, and one link is not the full array.
_ENDS, _ENDED = re.compile(r"(afterany|afterok|afternotok|afterburstbuffer):"), re.compile(r":(\d+)(?=:|$)")
JOBS = (*TRAINING, "export", "prepare_shards")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see ``--help``."""
    options = CommandParser(prog="python -m slurm.submit", add_help=False)
    options.add_argument("--nodes", default="1", help="nodes, or MIN-MAX: any number between them (default: 1)")
    options.add_argument(
        "--ranks-per-node",
        type=int,
        help="processes (default: in training RANKS_PER_NODE or GPUS_PER_NODE of slurm/site.env, else 1)",
    )
    options.add_argument("--time", help="wall time, as sbatch takes it (default: the site's, else the script's)")
    options.add_argument(
        "--grace",
        type=int,
        help="seconds before its end at which the run is signalled to save (default: the site's --signal, else 300)",
    )
    options.add_argument(
        "--chain",
        type=int,
        default=1,
        help="links, one after the other, for a run longer than the "
        "wall time where jobs may not be requeued (default: 1)",
    )
    options.add_argument("--dependency", help="as sbatch takes it, such as afterok:123")
    options.add_argument("--job-name", help="default: the folder's name")
    options.add_argument("--dry-run", action="store_true", help="print the script and the command, submit nothing")
    parser = CommandParser(prog="python -m slurm.submit", description=__doc__, parents=[options])
    parser.add_argument("job", choices=JOBS)
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="arguments of the program; for finetune, the task first"
    )
    words = sys.argv[1:] if argv is None else argv
    before_job = words[
        : next((index for index, word in enumerate(words) if word in JOBS and words[index - 1] != "--job-name"), 0)
    ]
    if not {"-h", "--help", "--version"} & set(before_job):
        options.parse_args(before_job)  # else the value of an unknown option would be taken for the job
    return parser.parse_args(words)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Check, then submit."""
    args = parse_arguments(argv)
    site = read_site(site_file())
    arguments = [argument for argument in args.arguments if argument != "--"]
    if {"-h", "--help"} & set(arguments):
        program = "finetune.__main__" if args.job == "finetune" else program_of(args.job, [])[0]
        importlib.import_module(program).main(arguments)
    folder, errors, notices = check(args, site, arguments)
    if errors:
        raise ConfigError(errors)
    assert folder is not None
    command = sbatch_command(args, site, arguments, folder)
    if not _options(args, site):
        name = "SBATCH_OPTIONS" if args.job in TRAINING else "SBATCH_OPTIONS_CPU"
        what = "no partition and no GPUs are" if args.job in TRAINING else "no partition is"
        missing = f"does not exist; copy {SCRIPTS / 'site.env.example'}"
        options = "gives sbatch no options" if site_file().is_file() else missing
        notices.append(f"{site_file()} {options} ({name}): {what} requested")
    if dropped := job_environment()[1]:
        notices.append(
            f"{', '.join(dropped)}: not passed to sbatch; write sbatch options into SBATCH_OPTIONS of {site_file()}"
        )
    for notice in notices:
        print(f"note: {notice}")
    if args.dry_run:
        print((SCRIPTS / f"{args.job}.sbatch").read_text())
        print(shlex.join(command))
        return
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch: not found on this machine; use --dry-run to print the command, or unimo3.launch to run without "
            "Slurm"
        )
    done = subprocess.run(command, env=job_environment()[0], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch rejected the job: {done.stderr.strip()}")
    number = done.stdout.strip().split(";")[0]
    if added := _excluded(args, site)[1]:
        history.append(folder, "exclude", job=number, nodes=added)  # a later start knows that they are not the user's
    print(f"job {number}: show its status with python -m slurm.status {shlex.quote(str(folder))}")


def sbatch_command(args: argparse.Namespace, site: Site, arguments: list[str], folder: Path) -> list[str]:
    """The words of the sbatch command."""
    words = ["sbatch", "--parsable", *_options(args, site), f"--nodes={args.nodes}"]
    ranks = args.ranks_per_node or site.ranks_per_node
    if args.job in TRAINING and "-" in args.nodes:
        # With a number of tasks Slurm gives a job of MIN-MAX nodes never more than MIN of them.
        words += [f"--mincpus={ranks}", f"--export=ALL,UNIMO3_RANKS_PER_NODE={ranks}"]
    elif args.job in TRAINING:
        words.append(f"--ntasks-per-node={ranks}")
    elif args.job == "prepare_shards":
        words.append(f"--ntasks={args.ranks_per_node or 1}")
    words.append(f"--job-name={args.job_name or folder.name.removesuffix('.job')}")
    words += [f"--time={args.time}"] if args.time else []
    words += [f"--signal=USR2@{args.grace}"] if args.grace else []
    excluded, added = _excluded(args, site)
    if added:
        words.append(f"--exclude={','.join(excluded)}")
    if args.chain > 1:
        words.append(f"--array=1-{args.chain}%1")
        words += [] if option_of(_options(args, site), "output") else ["--output=%x-%A_%a.log"]
    if args.dependency:
        words.append(f"--dependency={args.dependency}")
    return [*words, str(SCRIPTS / f"{args.job}.sbatch"), *arguments]


def _options(args: argparse.Namespace, site: Site) -> list[str]:
    return site.sbatch_options if args.job in TRAINING else site.cpu_options


def _excluded(args: argparse.Namespace, site: Site) -> tuple[list[str], list[str]]:
    """Nodes to exclude, and those of them that only the list of bad nodes excludes; the site may exclude others."""
    bad = sorted(bad_nodes.current())
    configured = option_of(_options(args, site), "exclude") or ""
    try:
        return choose(expand(configured), [], bad)
    except OSError:  # without Slurm the command is only shown
        return choose([configured], [], bad)


def check(args: argparse.Namespace, site: Site, arguments: list[str]) -> tuple[Path | None, list[str], list[str]]:
    """The folder that the job works on, None if it is not known; errors, which prevent submission; notices."""
    module, arguments = program_of(args.job, arguments)
    folder, unnamed = None, ""
    try:
        folder = work_folder(module, arguments)
    except ArgumentError as error:
        unnamed = str(error)
    if args.job in TRAINING:
        resources, errors = training_resources(args, site)
        missing = missing_program(module)
        program_errors, notices = (missing, []) if missing else check_training(resources, module, arguments, folder)
    else:
        errors = cpu_job_errors(args)
        is_later = args.dependency is not None
        program_errors, notices = check_export(arguments, is_later) if args.job == "export" else check_shards(arguments)
    errors += program_errors
    # The program may have reported the same error.
    words = [word for word in ("--config", "run.name", "--out", "--src") if word in unnamed]
    if unnamed and not any(word in line for word in words for line in program_errors):
        errors.append(unnamed)
    if folder is not None:
        try:
            errors += _conflict_errors(folder, args.dependency or "")
        except (OSError, subprocess.SubprocessError) as error:
            (notices if args.dry_run else errors).append(
                f"squeue: gives no answer ({squeue.message_of(error)}); it is not known which jobs work on {folder}; "
                "try again later"
            )
    return folder, errors, notices


def program_of(job: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The module that a job runs, and the module's arguments."""
    if job == "finetune":
        return f"finetune.{arguments[0] if arguments else ''}", arguments[1:]
    return ("pretrain.train" if job == "pretrain" else f"pretrain.{job}"), arguments


def _conflict_errors(folder: Path, dependency: str) -> list[str]:
    """Other jobs on the folder, but those that this one waits for."""
    conflicting = jobs_on(folder)
    awaited = awaited_jobs(dependency)
    return [
        f"{folder}: in use by job {job} ({state}); cancel that job, choose another folder, or submit with "
        f"--dependency=afterany:{job}"
        for job, state in conflicting.items()
        if job not in awaited
    ]


def awaited_jobs(dependency: str) -> set[str]:
    """Jobs whose end a dependency waits for; with terms joined by ``?`` one is enough to begin."""
    terms = [set(_ENDED.findall(term)) if _ENDS.match(term) else set() for term in re.split("[,?]", dependency)]
    return set.intersection(*terms) if "?" in dependency else set.union(*terms)


if __name__ == "__main__":
    main()
