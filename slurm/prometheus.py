"""States of runs as a file that node-exporter's textfile collector reads.

A value that is not known has no line. A loss that is not finite is NaN.

Source: Prometheus' text exposition format, https://prometheus.io/docs/instrumenting/exposition_formats.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from unimo3.errors import ConfigError

# Name, type, help; `_values` has a run's values in this order.
_METRICS = (
    ("unimo3_step", "gauge", "Optimizer steps done."),
    ("unimo3_loss", "gauge", "Loss of the last step."),
    ("unimo3_pairs_per_second", "gauge", "Median speed of the last steps."),
    ("unimo3_checkpoint_age_seconds", "gauge", "Time since the newest checkpoint was committed."),
    ("unimo3_held", "gauge", "Whether the job scripts hold a job of the run."),
    ("unimo3_restarts_total", "counter", "Starts of the run after its first."),
)
_BAD_NODES = ("unimo3_bad_nodes", "gauge", "Nodes that jobs exclude for a failed check.")


def write(path: Path, states: Sequence[dict[str, Any]], num_bad_nodes: int) -> None:
    """Replace a file by the states of runs, as `slurm.status.state_of` gives them.

    Raises:
        ConfigError: it cannot be written.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}")  # a name that node-exporter does not read
    try:
        staging.write_text(text_of(states, num_bad_nodes))
        staging.replace(path)
    except OSError as error:
        with suppress(OSError):
            staging.unlink(missing_ok=True)
        raise ConfigError(f"--prometheus {path}: cannot be written ({error.strerror}); name another file") from error


def text_of(states: Sequence[dict[str, Any]], num_bad_nodes: int) -> str:
    """The file's content."""
    runs = [(_escaped(state["run"]), _values(state)) for state in states]
    lines: list[str] = []
    for index, metric in enumerate(_METRICS):
        lines += _head(*metric)
        lines += [f'{metric[0]}{{run="{run}"}} {values[index]}' for run, values in runs if values[index] is not None]
    return "\n".join([*lines, *_head(*_BAD_NODES), f"{_BAD_NODES[0]} {num_bad_nodes}"]) + "\n"


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]


def _values(state: dict[str, Any]) -> list[float | None]:
    has_steps = state["step"] is not None
    loss = float("nan") if has_steps and state["loss"] is None else state["loss"]
    checkpoint = state["checkpoint"]
    return [
        state["step"],
        loss,
        state["pairs_per_s"],
        checkpoint["age_s"] if checkpoint else None,
        # Without Slurm's answer it is not known.
        None if state["queue_error"] else int(state["held"]),
        max(0, state["starts"] - 1),
    ]


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
