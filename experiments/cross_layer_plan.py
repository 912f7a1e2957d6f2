"""What the experiment on cross-layer interaction compares, and its runs, each a line of a file of results.

`cross_layer_design.md` has the reasons.

Source: none.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data_sets import DataSet, Stage
from experiments.peer import PEER
from experiments.picture_retrieval import PictureRetrieval, PictureSettings
from experiments.toy_vqa import ToyVqa, ToyVqaSettings
from experiments.variants import RunSettings
from unimo3.errors import ConfigError, DataError

Line = dict[str, Any]
"""A finished run: its `Run`, the settings and the data, what `do_one` measured, and the machine."""

COMPARED = ("in_layer", "bridge", "cross_layer_bridge", "cross_layer_bridge_even")
MOST_VARIANTS = 5
PILOT_SEEDS = (100, 101)
"""Of the pilot, which chooses the settings."""
SEEDS = {ToyVqa.name: tuple(range(1000, 1012)), PictureRetrieval.name: tuple(range(1000, 1010))}
"""Of the experiment on each data set, which no choice has seen."""
ALPHA = 0.05
POWER = 0.8
EFFECT = 0.01
"""The least difference of a primary metric that would be of interest."""
SETTINGS: dict[str, RunSettings] = {ToyVqa.name: ToyVqaSettings(), PictureRetrieval.name: PictureSettings()}
DATA_SETS: tuple[type[DataSet], ...] = (ToyVqa, PictureRetrieval)


class Comparison(NamedTuple):
    """A variant minus another, in the primary metric of a data set."""

    data_set: str
    variant: str
    reference: str


def comparisons(variants: Sequence[str]) -> list[Comparison]:
    """What is tested, all corrected together: on each data set cross-layer interaction against both in-layer variants,
    and each further variant against ``bridge``. The peer is not tested."""
    tested = ("in_layer", "bridge", "cross_layer_bridge", PEER)
    further = [(name, "bridge") for name in variants if name not in tested]
    pairs = [("cross_layer_bridge", "bridge"), ("cross_layer_bridge", "in_layer"), *further]
    return [Comparison(data_set.name, *pair) for data_set in DATA_SETS for pair in pairs if {*pair} <= {*variants}]


def seeds_of(stage: Stage, data_set: str) -> tuple[int, ...]:
    """Those that the design has for a data set."""
    return PILOT_SEEDS if stage == "pilot" else SEEDS[data_set]


def settings_from(text: str | None) -> dict[str, RunSettings]:
    """The settings of both data sets, changed by a JSON object of objects.

    Raises:
        ConfigError: with all its errors.
    """
    try:
        changes = json.loads(text or "{}")
        names = {name: {*asdict(settings)} for name, settings in SETTINGS.items()}
        unknown = [f"{name}.{key}" for name, values in changes.items() for key in {*values} - names.get(name, set())]
        unknown += [name for name in changes if name not in names]
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f'--settings {text}: a JSON object such as {{"pictures": {{"layers": 2}}}} is needed'
        ) from error
    if unknown:
        known = [f"{name}.{field.name}" for name, settings in SETTINGS.items() for field in fields(settings)]
        raise ConfigError([f"--settings: {name} is unknown; known are {', '.join(known)}" for name in sorted(unknown)])
    settings = {name: replace(value, **changes.get(name, {})) for name, value in SETTINGS.items()}
    errors = [f"--settings: {name}: {error}" for name, value in settings.items() for error in value.validate()]
    if errors:
        raise ConfigError(errors)
    return settings


@dataclass(frozen=True)
class Run:
    """One variant with one seed on one data set."""

    stage: Stage
    data_set: str
    variant: str
    seed: int

    def identity(self, settings: RunSettings) -> Line:
        """What makes a finished run the same as another."""
        return asdict(self) | {
            "interaction": settings.contestant(self.variant).interaction,
            "settings": asdict(settings),
        }

    def is_done(self, settings: RunSettings, lines: Sequence[Line]) -> bool:
        """Whether a line has this run, with these settings."""
        identity = self.identity(settings)
        return any(identity.items() <= line.items() for line in lines)


def read_lines(results: Path) -> list[Line]:
    """The finished runs of a file; none if it does not exist.

    Raises:
        DataError: a line is no JSON object.
    """
    lines = []
    for number, text in enumerate(results.read_text().splitlines() if results.exists() else [], start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"{results}: line {number}: cannot be read ({error}); remove it to do its run again"
            ) from error
        if not isinstance(line, dict):
            raise DataError(f"{results}: line {number}: is no object; remove it to do its run again")
        lines.append(line)
    return lines


def append_line(results: Path, line: Line) -> None:
    """Add a finished run; runs that end at once do not mix their lines."""
    results.parent.mkdir(parents=True, exist_ok=True)
    content = (json.dumps(line) + "\n").encode()
    descriptor = os.open(results, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        written = os.write(descriptor, content)
        assert written == len(content), "a disk that is full is an OSError"
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
