"""Copies the metrics of a run to Weights & Biases or MLflow: ``python -m pretrain.log_to {wandb,mlflow} RUN``.

All starts of a run become one run there. A second call sends what is new; --follow repeats that until Ctrl-C. The
training itself needs neither package, and waits for neither server. Server and login are set as the tools define:
WANDB_MODE, WANDB_API_KEY, MLFLOW_TRACKING_URI.
"""

import argparse
import importlib
import json
import math
import os
import re
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from unimo3 import config
from unimo3.atomic_write import replace_text
from unimo3.errors import CommandParser, ConfigError, UnreachableError, exit_with_status
from unimo3.gate_map import gates_by_layer, gates_of, level_names, mean_over_heads, num_tower_levels
from unimo3.json_lines import read_records

# And the package of each.
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
# MLflow takes at most 1000 metrics a request, and 100 parameters.
_BATCH, _PARAMETERS = 1000, 100
_VALUE_CHARACTERS = 500
# What MLflow refuses in a metric's name, such as a class of answers may have.
_NO_NAME = re.compile(r"[^\w./ -]", re.ASCII)


class Point(NamedTuple):
    """The metrics of a record by name.

    Attributes:
        key: distinguishes an evaluation or a save; None: of a training step.
    """

    step: int
    values: dict[str, float]
    key: str | None


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; see ``--help``."""
    parser = CommandParser(
        prog="python -m pretrain.log_to", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tool", choices=_PACKAGES)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--project", default="unimo3", help="project or experiment there (default: %(default)s)")
    parser.add_argument("--follow", action="store_true", help="send new metrics every few seconds, until Ctrl-C")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between updates (default: %(default)s)")
    args = parser.parse_args(argv)
    errors = []
    if not (args.run / "config.yaml").is_file():
        errors.append(f"{args.run}: is no run's folder, it has no config.yaml; name the folder of a run")
    if not args.every > 0:
        errors.append(f"--every {args.every}: a number of seconds above 0 is needed")
    if errors:
        raise ConfigError(errors)
    return args


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Send the metrics of a run."""
    args = parse_arguments(argv)
    with locked(args.run / f"log_to_{args.tool}.lock"):
        target = _open(args.tool, args.run, args.project)
        try:
            while True:
                _send_and_report(target, args.run, args.follow)
                if not args.follow:
                    break
                time.sleep(args.every)
        except KeyboardInterrupt:
            pass
        finally:
            target.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time send the metrics of a run.

    Raises:
        ConfigError: another one does.
    """
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"{path}: another log_to sends the metrics of this run; end it, or let it --follow"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _send_and_report(target: "Target", run: Path, is_repeated: bool) -> None:
    try:
        number = send(target, run)
    except UnreachableError as error:
        if not is_repeated:
            raise
        print(f"{error}; trying again", file=sys.stderr, flush=True)
        return
    print(f"{run}: {number} new records sent to {target.name}", flush=True)


class Target(ABC):
    """One run of a tracking tool. What was sent is noted in ``RUN/log_to_TOOL.json``.

    Args:
        run: the run's folder.
        project: in which a new run is made.
    """

    tool: str

    def __init__(self, run: Path, project: str):
        self._path = run / f"log_to_{self.tool}.json"
        self._noted = self._read()
        self._others = set(self._noted["others"])
        self._folder = run
        is_new = "run_id" not in self._noted
        self._noted["run_id"] = self.begin(run.resolve().name, project, self._noted.get("run_id"))
        if is_new:
            self._note()
            settings = config.read_flat(run / "config.yaml")
            self.add_settings({key: str(value)[:_VALUE_CHARACTERS] for key, value in settings.items()})

    @property
    def name(self) -> str:
        """The tool and the run's id there."""
        return f"{self.tool}, run {self._noted['run_id']}"

    def is_new(self, step: int, key: str | None) -> bool:
        """Whether this record was not sent yet; of evaluations and saves, any step may come again with other data."""
        return step > self._noted["last_step"] if key is None else key not in self._others

    def send(self, points: list[Point]) -> None:
        """Log points, and note that they were sent; after a kill the last ones may be sent again."""
        self.log(points)
        self._noted["last_step"] = max([self._noted["last_step"], *(p.step for p in points if p.key is None)])
        self._others |= {point.key for point in points if point.key is not None}
        self._noted["others"] = sorted(self._others)
        self._note()

    @abstractmethod
    def begin(self, name: str, project: str, run_id: str | None) -> str:
        """Open the run `run_id`, or a new one; its id."""

    @abstractmethod
    def add_settings(self, settings: dict[str, str]) -> None:
        """Record the run's settings."""

    @abstractmethod
    def log(self, points: list[Point]) -> None:
        """Send points."""

    @abstractmethod
    def close(self) -> None:
        """End; the run can be continued."""

    def _read(self) -> dict[str, Any]:
        if not self._path.exists():
            return {"last_step": 0, "others": []}
        try:
            noted = json.loads(self._path.read_text())
            if [type(noted[key]) for key in ("run_id", "last_step", "others")] == [str, int, list]:
                return dict(noted)
            reason = "a value is of another type"
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{self._path}: cannot be used ({reason}); remove it to send all to a new run")

    def _note(self) -> None:
        replace_text(self._path, json.dumps(self._noted) + "\n")


class Wandb(Target):
    """A run of Weights & Biases, whose own process sends what is logged."""

    tool = "wandb"

    def begin(self, name: str, project: str, run_id: str | None) -> str:
        """See `Target`."""
        import wandb

        run_id = run_id or uuid.uuid4().hex[:16]
        folder = os.environ.get("WANDB_DIR") or str(self._folder)
        quiet = wandb.Settings(silent=True)
        with _answered(self._path, "WANDB_MODE"):
            self._run = wandb.init(project=project, id=run_id, name=name, dir=folder, resume="allow", settings=quiet)
        # Its own steps only increase; an evaluation of an older checkpoint has an older one.
        self._run.define_metric("*", step_metric="step")
        return run_id

    def add_settings(self, settings: dict[str, str]) -> None:
        """See `Target`."""
        self._run.config.update(settings)

    def log(self, points: list[Point]) -> None:
        """See `Target`."""
        for point in points:
            self._run.log({"step": point.step, **point.values})

    def close(self) -> None:
        """See `Target`."""
        self._run.finish()


class Mlflow(Target):
    """A run of an MLflow experiment."""

    tool = "mlflow"

    def begin(self, name: str, project: str, run_id: str | None) -> str:
        """See `Target`."""
        from mlflow import MlflowClient

        with _answered(self._path, "MLFLOW_TRACKING_URI"):
            self._client = MlflowClient()
            if run_id is not None:
                self._client.set_terminated(run_id, "RUNNING")
                return run_id
            experiment = self._client.get_experiment_by_name(project)
            parent = experiment.experiment_id if experiment else self._client.create_experiment(project)
            return str(self._client.create_run(parent, run_name=name).info.run_id)

    def add_settings(self, settings: dict[str, str]) -> None:
        """See `Target`."""
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in settings.items()]
        with _answered(self._path, "MLFLOW_TRACKING_URI"):
            for start in range(0, len(params), _PARAMETERS):
                self._client.log_batch(self._noted["run_id"], params=params[start : start + _PARAMETERS])

    def log(self, points: list[Point]) -> None:
        """See `Target`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, point.step) for point in points for name, value in point.values.items()]
        with _answered(self._path, "MLFLOW_TRACKING_URI"):
            for start in range(0, len(metrics), _BATCH):
                self._client.log_batch(self._noted["run_id"], metrics=metrics[start : start + _BATCH])

    def close(self) -> None:
        """See `Target`; a server that does not answer leaves the run as running."""
        with suppress(UnreachableError, ConfigError), _answered(self._path, "MLFLOW_TRACKING_URI"):
            self._client.set_terminated(self._noted["run_id"], "FINISHED")


@contextmanager
def _answered(note: Path, variable: str) -> Iterator[None]:
    """Turn errors of a tool's client, which are of many kinds, into this project's."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "RESOURCE_DOES_NOT_EXIST" in str(getattr(error, "error_code", "")):
            raise ConfigError(
                f"{note}: its run does not exist ({reason}); check {variable}, or remove the file to send all again"
            ) from error
        raise UnreachableError(
            f"{reason}; check {variable}, the login and the server, then start the same command again to send the rest"
        ) from error


def _open(tool: str, run: Path, project: str) -> Target:
    try:
        importlib.import_module(tool)
    except ImportError as error:
        raise ConfigError(f"{tool}: cannot be imported ({error}); pip install {_PACKAGES[tool]}") from error
    target = {"wandb": Wandb, "mlflow": Mlflow}[tool]
    return target(run, project)


def send(target: Target, run: Path) -> int:
    """Send what is new, in the order of the file; the number of records.

    A run that is resumed writes the steps after its checkpoint again, to the same values: they are not sent again.
    """
    num_tower, points = num_tower_levels(run), []
    for record in read_records(run / "metrics.jsonl"):
        group, step = record.get("group"), record.get("step")
        key = None if group is None else f"{group} {step} {record.get('data', '')}"
        if isinstance(step, int) and target.is_new(step, key):
            points.append(Point(step, dict(_values(record, group or "train", num_tower)), key))
    for start in range(0, len(points), _BATCH):
        target.send(points[start : start + _BATCH])
    return len(points)


def _values(record: dict[str, Any], group: str, num_tower: int) -> Iterator[tuple[str, float]]:
    """Numbers of a record by name; gates as the mean of the heads for each layer and level."""
    for name, value in record.items():
        if name in ("step", "group", "version"):
            continue
        name = _NO_NAME.sub("_", name)
        if isinstance(value, int | float) and math.isfinite(value):
            yield f"{group}/{name}", value
        elif name.startswith("gates_") and (gates := gates_of(record, name)) is not None:
            layers = mean_over_heads(gates_by_layer(gates, num_tower))
            labels = level_names(len(layers[-1]), len(layers))
            for layer, levels in enumerate(layers, 1):
                if len(levels) > 1:
                    for label, gate in zip(labels, levels, strict=False):
                        yield f"{group}/{name}/layer_{layer}_level_{label}", gate


if __name__ == "__main__":
    main()
