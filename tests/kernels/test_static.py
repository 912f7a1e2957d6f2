"""What the Triton kernels are compiled to, for GPUs this machine need not have."""

import itertools
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ("forward", "forward_short", "backward_query", "backward_query_short", "backward_key", "backward_fused")
WIDTHS = (32, 64, 96, 128)
# The most a block of threads may have, of the smallest chip of its kind (8.6 and 8.9 among 8.x).
SHARED_BYTES = {80: 101_376, 90: 232_448, 100: 232_448}


def run(*command):
    """In a separate process: in this one, triton interprets."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The complete table: metrics of the record, compiled where it has none for the current source."""
    path = tmp_path_factory.mktemp("static") / "rows.jsonl"
    run("-m", "benchmarks.kernel_static", "--json", path)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.integration
def test_the_table_is_complete_spills_little_and_fits_shared_memory(rows):
    kinds = set(itertools.product(KERNELS, ("fp16", "bf16", "fp32"), WIDTHS, SHARED_BYTES))
    # ptxas takes a minute for each of these; the table has one entry of float32 for all capabilities.
    kinds -= set(itertools.product(KERNELS, ("fp32",), WIDTHS, (100,)))
    assert {(row["kernel"], row["dtype"], row["width"], row["capability"]) for row in rows} == kinds
    # The module names the entries that spill, with the reason; of the others nothing spills.
    spilling = [row["local_bytes"] for row in rows if row["local_bytes"]]
    assert len(spilling) <= 50
    assert max(spilling) <= 72
    too_large = [row for row in rows if row["shared_bytes"] > SHARED_BYTES[row["capability"]]]
    assert too_large == []


@pytest.mark.integration
def test_half_types_run_on_tensor_cores(rows):
    without = [row for row in rows if row["dtype"] != "fp32" and not row["matrix_instructions"]]
    assert without == []
    # Float32 must not be cut to TF32 by them.
    assert [row for row in rows if row["dtype"] == "fp32" and row["matrix_instructions"]] == []


SAMPLE = """
import json, os
os.environ["KERNEL_STATIC_RECOMPILE"] = os.environ["TRITON_ALWAYS_COMPILE"] = "1"
from dataclasses import asdict
from benchmarks.kernel_static import KERNELS, fits, measure, table_builds
for number, name in enumerate(KERNELS):
    dtype, width, capability = (("bf16", 64, 90), ("fp16", 64, 100), ("fp16", 128, 90))[number % 3]
    key = (name, dtype, width, capability)
    build = [b for b in table_builds([width]) if (b.kernel, b.dtype, b.width, b.capability) == key][-1]
    content, usage = measure(build)
    print(json.dumps({"content": content, **asdict(build), **asdict(usage)}))

from benchmarks.kernel_static import Blocks, Build, Resources
build = Build("forward", "fp16", 128, 90, Blocks(128, 64, 4, 2))
_, usage = measure(build)
print(json.dumps([usage.local_bytes, fits(usage, build)]))

def warps(capability, num_warps, registers, shared_bytes=1024):
    return Resources(registers, 0, shared_bytes, 1, 1).resident_warps(capability, num_warps)
print(json.dumps([warps(90, 4, 128), warps(90, 4, 168), warps(90, 8, 255), warps(90, 4, 32, 70_000),
                  warps(80, 4, 32, 70_000), warps(90, 1, 24)]))
"""


@pytest.fixture(scope="module")
def sample():
    """An entry of each kernel in the table, one that spills, and resident warps; triton compiles in one process."""
    return [json.loads(line) for line in run("-c", SAMPLE).stdout.splitlines()]


RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.skipif(
    (sys.version_info[:2], platform.machine()) != ((3, 11), "x86_64")
    or f"triton {version('triton')} " not in (RESULTS / "kernel_static.md").read_text(),
    reason="the record is of another Triton",
)
@pytest.mark.integration
def test_the_record_is_of_the_kernels_in_the_tree(rows):
    recorded = [json.loads(line)["content"] for line in (RESULTS / "kernel_static.jsonl").read_text().splitlines()]
    missing = {row["content"] for row in rows} - set(recorded)
    assert not missing, f"{len(missing)} entries changed: run `python -m benchmarks.kernel_static`, commit its results"


@pytest.mark.integration
def test_the_record_has_what_the_compiler_gives(rows, sample):
    compiled = sample[:-2]
    assert len(compiled) == len(KERNELS)
    assert [row for row in compiled if row not in rows] == []


@pytest.mark.integration
def test_kernels_of_base_issue_and_move_no_more_than_they_should(rows):
    def slots(kernel, dropout):
        kind = {"kernel": kernel, "dtype": "bf16", "width": 64, "capability": 90, "masked": True, "dropout": dropout}
        matching = [row for row in rows if kind.items() <= row.items() and row["blocks"][:2] == [64, 64]]
        return max(row["loop_instructions"] * row["blocks"][2] / 4 for row in matching)

    assert slots("forward_short", False) <= 600
    assert slots("backward_query_short", False) <= 600
    assert slots("forward", True) <= 1.5 * slots("forward", False)
    assert slots("forward_short", True) <= 1.5 * slots("forward_short", False)
    report = (RESULTS / "kernel_static.md").read_text()
    backward = next(line for line in report.splitlines() if line.startswith("| text reads image |")).split("|")[3]
    assert int(backward) <= 800


@pytest.mark.integration
def test_a_register_spill_is_detected(sample):
    local_bytes, fits = sample[-2]
    assert local_bytes > 0
    assert not fits


@pytest.mark.integration
def test_resident_warps_are_bounded_by_registers_shared_memory_and_blocks(sample):
    # 65536 registers, by 256 a warp; 228 KiB (100 KiB on 8.6) less 1 KiB a block; 32 blocks.
    assert sample[-1] == [16, 12, 8, 12, 4, 32]
