"""Shared by all tests: the environment a machine without a GPU needs, how tests are spread, and what a run reports."""

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before anything is imported.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run in several processes already; and no thread may run in the server that ranks are forked from.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A pool of compilers would import torch once for each of them, more than one test here compiles.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# DeepSpeed's AdamW takes minutes to compile: once a checkout, for these versions.
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR",
    str(
        Path(__file__).parents[1]
        / ".cache"
        / "torch_extensions"
        / f"python{sys.version_info[0]}.{sys.version_info[1]}_torch{version('torch')}_deepspeed{version('deepspeed')}"
    ),
)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Read where a kernel is defined, so before any test imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import unimo3  # noqa: F401  (before transformers: it makes torchvision importable)

_NUM_SLOWEST = 10
_STARTS_PROCESS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "tests.spawn.start")
# Shared fixtures that start some.
_PROCESS_FIXTURES = {"cluster", "program", "saved", "tuned"}
# What takes longest begins first.
_FIRST_GROUPS = (
    "slurm_jobs",
    "slurm_submission",
    "commands",
    "test_interruption",
    "test_plan",
    "test_triton",
    "test_engine",
)
_started: list[str] = []


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one group run in one process, one after the other: those of a file, unless a mark names another group.

    Files that share what is expensive to make, such as a Slurm or a finished run, have the mark ``xdist_group``.
    """
    for item in items:
        if _PROCESS_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.integration)
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(Path(item.path).stem))
    items.sort(key=lambda item: _rank(_group(item)))


def _group(item: pytest.Item) -> str:
    mark = item.get_closest_marker("xdist_group")
    assert mark is not None
    return str(mark.args[0])


def _rank(group: str) -> int:
    return _FIRST_GROUPS.index(group) if group in _FIRST_GROUPS else len(_FIRST_GROUPS)


def _note_process(event: str, arguments: tuple[Any, ...]) -> None:
    # Each process asks the compiler of the CPU kernel for its version once, in whichever test comes first.
    if event in _STARTS_PROCESS and not {"c++", "g++"}.intersection(arguments[:1]):
        _started.append(f"{event} {arguments[:1]}")


sys.addaudithook(_note_process)


@pytest.fixture(autouse=True)
def _processes_need_their_mark(request: pytest.FixtureRequest) -> Iterator[None]:
    """``make test-quick`` leaves out what is marked ``integration``; whatever starts a process has to be."""
    _started.clear()
    yield
    if _started and request.node.get_closest_marker("integration") is None:
        pytest.fail(f"starts processes without the mark 'integration': {_started[:3]}", pytrace=False)


@pytest.fixture
def libaio() -> None:
    """Skips a test of states on NVMe where DeepSpeed's async_io cannot be built."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        assert not os.environ.get("REQUIRE_LIBAIO"), "REQUIRE_LIBAIO is set, and there is no libaio-dev"
        pytest.skip("DeepSpeed's async_io needs libaio's headers, libaio-dev")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The slowest tests, and the time by folder; with several processes they add up to more than the run took."""
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.split("@")[0]] += report.duration
    folders: dict[str, list[float]] = defaultdict(list)
    for test, duration in seconds.items():
        folders[str(Path(test.split("::")[0]).parent)].append(duration)
    terminalreporter.section(f"{_NUM_SLOWEST} slowest tests, with their fixtures")
    for test, duration in sorted(seconds.items(), key=lambda entry: -entry[1])[:_NUM_SLOWEST]:
        terminalreporter.write_line(f"{duration:8.1f} s  {test}")
    terminalreporter.section("time by folder")
    for folder, durations in sorted(folders.items(), key=lambda entry: -sum(entry[1])):
        terminalreporter.write_line(f"{sum(durations):8.1f} s  {len(durations):5} tests  {folder}")
