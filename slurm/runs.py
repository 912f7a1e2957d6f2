"""Which folder a command works on: ``python -m slurm.runs MODULE ARGUMENTS...`` prints ``answer: FOLDER``.

    RUN        of training
    OUT.job    of an export or a conversion: next to what it makes, which must not exist before; where OUT is in an
               object store, next to the local folder in which it is made
    SRC        of pretrain.prepare_shards index, which writes next to the tars

Read from the recipe and the arguments alone, so that a job script knows it in a tenth of a second and without torch. An
unknown task of fine-tuning exits with status 78, as invalid arguments do.

Source: unimo3/training/run.py for the settings' meaning; unimo3/config.py for the form of arguments.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from finetune.tasks import PROGRAMS
from slurm.commands import print_answer
from unimo3.object_store import staging_folder
from unimo3.project_files import project_file

Result = TypeVar("Result")

_DEFAULTS = {"run.dir": "runs", "run.name": "run"}
_TAG = re.compile(r"^step_(\d{8,})$")
_CONFIG_STATUS = 78
_JOB_SUFFIX = ".job"
# As unimo3/data/conversion.py and shards.py name them, which cannot be imported without the libraries they use.
_STAGING, _SHARD_DONE, _SENT = ".partial", "*.unimo3-done", ".upload"


class ArgumentError(ValueError):
    """The arguments or the recipe do not name a run."""


def work_folder(program: str, arguments: list[str], start: Path = Path()) -> Path:
    """The folder that a program works on, where its job keeps its history; only one job at a time may.

    Args:
        program: its module, such as ``pretrain.train``.
        start: folder in which it is started.

    Raises:
        ArgumentError: the arguments do not name one.
    """
    if program not in ("pretrain.export", "pretrain.prepare_shards"):
        return run_folder(arguments, start)
    in_place = program == "pretrain.prepare_shards" and arguments[:1] == ["index"]
    key = "--src" if in_place else "--out"
    value = _last_value(arguments, key)
    if "://" in value:
        key, value = "--staging", _last_value(arguments, "--staging") or str(staging_folder(value))
    if not value.isprintable() or Path(value).name in ("", ".."):
        raise ArgumentError(f"{key} {value!r}: the printable name of a folder is needed")
    folder = start / value
    return folder if in_place else folder.with_name(folder.name + _JOB_SUFFIX)


def _last_value(arguments: list[str], key: str) -> str:
    """The value of an option, of which a later one wins; empty if it is not there."""
    value = ""
    for index, word in enumerate(arguments):
        name, equals, rest = word.partition("=")
        if name == key:
            value = rest if equals else next(iter(arguments[index + 1 :]), "")
    return value


def run_folder(arguments: list[str], start: Path = Path()) -> Path:
    """The folder of the run that ``--config FILE --run.name NAME ...`` name; later arguments win.

    Args:
        start: folder in which the program is started.

    Raises:
        ArgumentError: a recipe cannot be read, or the name is invalid.
    """
    settings: dict[str, Any] = dict(_DEFAULTS)
    rest = list(arguments)
    while rest:
        key, equals, value = rest.pop(0).removeprefix("--").partition("=")
        if not equals:
            if not rest:
                raise ArgumentError(f"--{key}: a value is needed after it")
            value = rest.pop(0)
        if key == "config":
            settings |= _of_recipe(project_file(value, start))
        elif key in _DEFAULTS:
            settings[key] = value
    name, folder = str(settings["run.name"]), str(settings["run.dir"])
    if not (folder + name).isprintable() or Path(name).name != name or name in ("", "..") or not folder:
        raise ArgumentError(
            f"run.dir {folder!r}, run.name {name!r}: printable names are needed, the second without '/'"
        )
    return start / folder / name


def newest_step(run: Path) -> int | None:
    """Step of the newest committed checkpoint, whether it is good or not."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir() if (path / "MANIFEST.json").is_file()] if folder.is_dir() else []
    return max((int(match[1]) for name in names if (match := _TAG.match(name))), default=None)


def read_newest_checkpoint(run: Path, read: Callable[[int, Path], Result]) -> Result | None:
    """What `read` returns of step and manifest of the newest committed checkpoint; None without one.

    The run may remove it meanwhile, and then has a newer one.
    """
    step = newest_step(run)
    while step is not None:
        try:
            return read(step, run / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json")
        except FileNotFoundError:
            tried, step = step, newest_step(run)
            if step == tried:
                raise
    return None


def progress(folder: Path) -> int | None:
    """What a start resumes from: step of a run's newest checkpoint, or number of a conversion's finished shards.

    Of a conversion into an object store, also the number of objects that were sent.
    """
    step = newest_step(folder)
    if step is not None:
        return step
    finished = [*folder.glob(_SHARD_DONE)]
    if folder.suffix == _JOB_SUFFIX:
        out = folder.with_suffix("")
        finished += out.with_name(out.name + _STAGING).glob(f"*/{_SHARD_DONE}")
        sent = out.with_name(out.name + _SENT)
        if sent.is_file():  # which has a header
            finished += out.glob("*/*.tar")
            return len(finished) + len(sent.read_bytes().splitlines()) - 1 or None
    return len(finished) or None


def checkpoint_bytes(run: Path) -> int:
    """Size of the newest committed checkpoint; 0 if there is none."""
    listed = read_newest_checkpoint(run, lambda _, manifest: json.loads(manifest.read_text())["files"])
    return sum(int(entry["bytes"]) for entry in listed or [])


def _of_recipe(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ArgumentError(f"--config {path}: cannot be read ({error})") from error
    group = content.get("run") if isinstance(content, dict) else None
    if not isinstance(group, dict):
        return {}
    return {key: group[key.removeprefix("run.")] for key in _DEFAULTS if key.removeprefix("run.") in group}


def missing_program(module: str) -> list[str]:
    """An error if a task of fine-tuning does not exist.

    Args:
        module: a program, such as ``finetune.vqa``; without a task ``finetune.``.
    """
    package, _, task = module.partition(".")
    if package != "finetune" or task in PROGRAMS:
        return []
    return [f"'{module}': there is no such program; finetune takes a task first: {', '.join(PROGRAMS)}"]


def main(argv: list[str]) -> int:
    """Print the folder, or the errors of the program's name and arguments; return an exit status."""
    program, *arguments = argv
    errors = missing_program(program)
    try:
        folder = work_folder(program, arguments)
    except ArgumentError as error:
        errors.append(str(error))
    if errors:
        print("ConfigError:", "; ".join(errors), file=sys.stderr)
        return _CONFIG_STATUS
    print_answer(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
