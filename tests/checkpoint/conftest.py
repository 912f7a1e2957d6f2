"""Checkpoints that two real ranks wrote, made once for all tests here; each test damages its copies."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.ranks import RUNS, save_runs
from tests.spawn import run_ranks


@dataclass
class SavedRuns:
    """`root` contains a folder for each of `RUNS`, and `unimo`; `results[rank]` is what that rank returned."""

    root: Path
    results: list[dict[str, Any]]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedRuns:
    root = tmp_path_factory.mktemp("runs")
    stale = root / "bf16" / "checkpoints" / "step_00000001.tmp"
    stale.mkdir(parents=True)
    (stale / "left_by_a_killed_save.pt").write_text("half")
    results = run_ranks(2, save_runs, root)
    for name in RUNS:
        (root / name / "model").mkdir()
        (root / name / "model" / "config.json").write_text('{"model_type": "odd"}')
        (root / name / "model" / "tokenizer.json").write_text("{}")
    return SavedRuns(root, results)


@pytest.fixture
def run_copy(saved: SavedRuns, tmp_path: Path) -> Callable[[str], Path]:
    """Copies a saved run to a folder where it may be damaged."""
    return lambda name: Path(shutil.copytree(saved.root / name, tmp_path / name))
