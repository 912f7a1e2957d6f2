"""What the Triton kernels are compiled to, with no GPU: registers, spills, shared memory, instructions of their loops.

The report has every entry of the table of blocks for compute capabilities 8.0, 9.0 and 10.0, with seven levels, gate,
padding and dropout. Fewer levels or arguments can take more registers, so the recipes' head width, 64, is compiled with
others too. The numbers are read from the machine code.

An entry compiles in seconds. `RECORD` has the numbers of each entry by Triton's cache key: source, options, target,
variables, and versions of Triton and ptxas. Entries without a record are compiled. ``--recompile`` compiles all.
``--triton 3.6.0`` checks the same under another Triton, which pip fetches into the project's cache.

Source: triton.compile for a named target; cuobjdump and nvdisasm, which come with triton.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Compiled, not interpreted; read when the kernels are defined.
os.environ["TRITON_INTERPRET"] = "0"
# As launch.py has it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# Saved in the project, not in the home.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".cache" / "triton"))

import torch
import triton
from tqdm import tqdm
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key

import unimo3  # noqa: F401  (it makes torchvision importable)
from benchmarks.machine_code import SM_WARPS, Resources, read_resources
from benchmarks.report import ROOT, usable_cores, write_report
from unimo3.errors import CommandParser, exit_with_status
from unimo3.kernels.cross_layer_attention import HEAD_WIDTHS
from unimo3.kernels.cross_layer_attention.blocks import (
    CAPABILITIES,
    KERNELS,
    WIDTHS,
    Blocks,
    backward_kernels,
    entry,
    fitted,
)
from unimo3.kernels.cross_layer_attention.launch import FUNCTIONS

LEVELS = 7
# The recipes' heads, and the levels that their layers see in addition.
RECIPE_WIDTH, RECIPE_LEVELS = 64, (1, 6)
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Shared memory of a block; 80 stands for all of 8.x.
BLOCK_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MIN_WARPS = 8
RECORD = ROOT / "benchmarks" / "results" / "kernel_static.jsonl"
# Lengths of queries and keys for which blocks differ: of texts and images, and of shorter ones.
TEXT, IMAGE, SHORTER = 50, 325, 20
LENGTHS = {
    "forward": ((IMAGE, IMAGE), (SHORTER, IMAGE)),
    "forward_short": ((IMAGE, TEXT), (IMAGE, SHORTER)),
    "backward_query": ((IMAGE, IMAGE),),
    "backward_query_short": ((IMAGE, TEXT), (IMAGE, SHORTER)),
    "backward_key": ((IMAGE, IMAGE), (IMAGE, SHORTER)),
    "backward_fused": ((TEXT, IMAGE), (SHORTER, IMAGE)),
}
# ptxas takes a minute for an entry; it is one that is compiled for 8.0 and 9.0 as well.
SLOW_TO_COMPILE = (100, torch.float32)
# Bytes of a thread that may spill, by kernel and head width. Of `backward_fused` at 64, blocks that spill nothing issue
# a third more instructions. Of the others, `search` compiles two builds alone; some other dtype, length or number of
# levels spills a few registers, and blocks that do not have not been looked for.
ALLOWED_SPILLS = {
    ("forward", 32): 16,
    ("forward", 64): 16,
    ("forward", 96): 8,
    ("forward_short", 32): 8,
    ("forward_short", 64): 8,
    ("backward_query", 96): 72,
    ("backward_query", 128): 32,
    ("backward_query_short", 32): 16,
    ("backward_query_short", 64): 8,
    ("backward_key", 32): 8,
    ("backward_key", 64): 24,
    ("backward_fused", 64): 72,
    ("backward_fused", 96): 8,
}
# Bytes that a thread may spill besides under another Triton than the installed one. 3.6.0 spills 8 to 32 more in some
# entries, 96 in all at most: of `backward_fused` at 64.
OTHER_TRITON_BYTES = 32
_OTHER_TRITON = "KERNEL_STATIC_OTHER_TRITON"
# Processes of a pool take it from here.
_RECOMPILE = "KERNEL_STATIC_RECOMPILE"


@dataclass(frozen=True)
class Build:
    """A kernel to compile: for a dtype (as in `TYPES`), head width, compute capability, blocks and arguments."""

    kernel: str
    dtype: str
    width: int
    capability: int
    blocks: Blocks
    levels: int = LEVELS
    masked: bool = True
    dropout: bool = True


def fits(usage: Resources, build: Build) -> bool:
    """Whether it spills no more than allowed, has the shared memory, and enough warps to hide latencies."""
    allowed = ALLOWED_SPILLS.get((build.kernel, build.width), 0)
    allowed += OTHER_TRITON_BYTES if os.environ.get(_OTHER_TRITON) else 0
    return (
        usage.local_bytes <= allowed
        and usage.shared_bytes <= BLOCK_BYTES[build.capability]
        and usage.resident_warps(build.capability, build.blocks.warps) >= MIN_WARPS
    )


def table_builds(widths: Sequence[int]) -> list[Build]:
    """Every entry of the table, for each dtype and each of these head widths it supports."""
    builds = {
        build: None
        for capability, dtype, width, name in itertools.product(CAPABILITIES, TYPES, widths, KERNELS)
        if (capability, dtype) != SLOW_TO_COMPILE
        for either in [[blocks_of(name, entry(name, dtype, width, capability, drop)) for drop in (False, True)]]
        for blocks in dict.fromkeys(itertools.chain(*either))
        for build in variants(Build(name, TYPES[dtype], width, capability, blocks))
        if blocks in either[build.dropout]
    }
    return list(builds)


def blocks_of(name: str, largest: Blocks) -> list[Blocks]:
    """An entry's blocks for the lengths of `LENGTHS` that its kernel takes."""
    taken = [
        (queries, keys)
        for queries, keys in LENGTHS[name]
        if not (name.endswith("_short") and keys > largest.keys)
        and not (name == "backward_fused" and queries > largest.queries)
    ]
    return list(dict.fromkeys(fitted(largest, *lengths) for lengths in taken or [(largest.queries, largest.keys)]))


def variants(build: Build) -> list[Build]:
    """A build, and with other levels and arguments what of it the recipes run."""
    if build.width != RECIPE_WIDTH or build.dtype != "bf16":
        return [build]
    others = itertools.product(RECIPE_LEVELS, (False, True), (False, True))
    without = replace(build, dropout=False)
    return [build, without, *(replace(build, levels=n, masked=mask, dropout=drop) for n, mask, drop in others)]


def source_of(build: Build) -> ASTSource:
    """The source to compile, as launch.py gives it: every tensor starts at a multiple of 16 bytes."""
    fn = FUNCTIONS[build.kernel]
    constants = {
        "LEVELS": build.levels,
        "WIDTH": build.width,
        "BLOCK_T": build.blocks.queries,
        "BLOCK_V": build.blocks.keys,
        "BLOCK_D": triton.next_power_of_2(build.width),
        "HAS_GATE": True,
        "HAS_MASK": build.masked,
        "DROPOUT": build.dropout,
        "PRECISION": "ieee",
    }
    pointer, levels = f"*{build.dtype}", build.levels
    kinds: dict[str, Any] = {
        **dict.fromkeys(("q", "out", "grad_out", "grad_q"), pointer),
        **dict.fromkeys(("kvs", "grad_kvs"), (pointer,) * levels),
        # Queries stand for masks and bits that are not there.
        "masks": ("*u8" if build.masked else pointer,) * levels,
        "bits": "*i32" if build.dropout else pointer,
        **dict.fromkeys(("gate", "lse", "offsets"), "*fp32"),
        "lengths": ("i32",) * levels,
        **dict.fromkeys(("longest", "num_heads", "num_queries"), "i32"),
        **dict.fromkeys(("scale", "dropout_p"), "fp32"),
    }
    signature = {name: kinds.get(name, "constexpr") for name in fn.arg_names}
    even = [["tt.divisibility", 16]]
    attributes: dict[tuple[int, ...], list] = {}
    for index, kind in enumerate(signature.values()):
        if isinstance(kind, tuple) and kind[0].startswith("*"):
            attributes |= {(index, level): even for level in range(levels)}
        elif kind[0] == "*":
            attributes[index,] = even
    return ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)


def content_of(source: ASTSource, target: GPUTarget, options: dict[str, int]) -> str:
    """Equal where the compiled code is: a hash of Triton's cache key."""
    backend = make_backend(target)
    key = get_cache_key(
        source, backend, backend.parse_options(dict(options)), env_vars=get_cache_invalidating_env_vars()
    )
    return hashlib.sha256(key.encode()).hexdigest()[:32]


@functools.cache
def _recorded() -> dict[str, Resources]:
    if os.environ.get(_RECOMPILE) or not RECORD.exists():
        return {}
    rows = [json.loads(line) for line in RECORD.read_text().splitlines()]
    fields = Resources.__annotations__
    return {
        row["content"]: Resources(**{key: row[key] for key in fields}) for row in rows if fields.keys() <= row.keys()
    }


def measure(build: Build) -> tuple[str, Resources | None]:
    """Its content and resources, from the record or by compiling it; None where the compiler gives up."""
    source, target = source_of(build), GPUTarget("cuda", build.capability, 32)
    options = {"num_warps": build.blocks.warps, "num_stages": build.blocks.stages}
    content = content_of(source, target, options)
    if content in _recorded():
        return content, _recorded()[content]
    try:
        compiled = triton.compile(source, target=target, options=options)
    except triton.runtime.errors.PTXASError:
        return content, None
    return content, read_resources(compiled.asm["cubin"], compiled.metadata.shared)


def measure_all(builds: list[Build], what: str) -> dict[Build, tuple[str, Resources | None]]:
    """Each build's content and resources, by as many processes as there are cores."""
    with ProcessPoolExecutor(usable_cores()) as pool:
        done = tqdm(pool.map(measure, builds), total=len(builds), desc=what, mininterval=5)
        return dict(zip(builds, done, strict=True))


def candidates(capability: int, dtype: str) -> list[Blocks]:
    """Blocks that `search` compiles."""
    if dtype == "fp32":
        return [Blocks(queries, keys, 8, 2) for queries, keys in (*itertools.product((16, 32), (16, 32, 64)), (64, 32))]
    sizes = ((64, 64), (64, 32), (32, 64), (32, 32))
    # On 9.0 two groups of four warps share a product of 128 rows; of 64, each would compute all of it.
    warps, stages = ((4,), (2, 3)) if capability == 90 else ((4, 8), (2,))
    return [Blocks(*size, *rest) for size in sizes for rest in itertools.product(warps, stages)]


def best(name: str, measured: dict[Blocks, list[Resources]]) -> Blocks | None:
    """Choose, among blocks that fit, those whose loops issue least; then the fewest registers.

    A block that has to cover all keys or queries covers as many as it can.

    Args:
        measured: what the kernel takes of each build; none where one does not fit.
    """

    def rank(blocks: Blocks) -> tuple[int, float, int]:
        covered = blocks.keys if name.endswith("_short") else blocks.queries if name == "backward_fused" else 0
        slots = max(usage.slots(blocks) for usage in measured[blocks])
        return -covered, slots, max(usage.registers for usage in measured[blocks])

    return min((blocks for blocks in measured if measured[blocks]), key=rank, default=None)


def search() -> None:
    """Print the entries that the rule of `best` gives, as they stand in blocks.py."""
    kinds = [*((capability, "bf16") for capability in CAPABILITIES), (CAPABILITIES[0], "fp32")]
    for width, (capability, dtype) in itertools.product(WIDTHS, kinds):
        for name in KERNELS:
            builds = {
                blocks: [Build(name, dtype, width, capability, blocks, dropout=dropout) for dropout in (True, False)]
                for blocks in candidates(capability, dtype)
            }
            flat = measure_all(list(itertools.chain(*builds.values())), f"{capability} {dtype} {width} {name}")
            kinds_of_call = {"": (0, 1), " with dropout": (0,), " without": (1,)}
            for kind, chosen in kinds_of_call.items():
                measured: dict[Blocks, list[Resources]] = {}
                for blocks, both in builds.items():
                    needed = [both[index] for index in chosen]
                    fitting = [usage for build in needed if (usage := flat[build][1]) and fits(usage, build)]
                    measured[blocks] = fitting if len(fitting) == len(needed) else []
                print(f'{capability} {dtype} {width} "{name}"{kind}: {best(name, measured)}', flush=True)


def table(measured: dict[Build, Resources]) -> str:
    """The result in markdown."""
    lines = []
    for capability in CAPABILITIES:
        lines += [
            f"## sm_{capability}",
            "",
            "| kernel | dtype | head width | queries x keys | warps, stages | registers | spilled bytes | "
            "shared bytes | matrix instructions | resident warps | slots, slots without dropout |",
            "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for build, usage in measured.items():
            dropped, plain = (measured.get(replace(build, dropout=dropout)) for dropout in (True, False))
            is_row = build.dropout or not dropped  # an entry without dropout may have blocks of its own
            if is_row and build.capability == capability and build == replace(build, levels=LEVELS, masked=True):
                blocks, resident = build.blocks, usage.resident_warps(capability, build.blocks.warps)
                slots = f"{dropped.slots(blocks):.0f}" if dropped else "-"
                slots += f", {plain.slots(blocks):.0f}" if plain else ""
                lines.append(
                    f"| {build.kernel} | {build.dtype} | {build.width} | {blocks.queries} x {blocks.keys} | "
                    f"{blocks.warps}, {blocks.stages} | {usage.registers} | {usage.local_bytes} | "
                    f"{usage.shared_bytes:,} | {usage.matrix_instructions} | {resident} | {slots} |"
                )
        lines.append("")
    return "\n".join(lines)


INTRODUCTION = f"""Compiled by triton {triton.__version__} for GPUs this machine does not have; nothing was run.
{LEVELS} levels, gate, padding and dropout; head width {RECIPE_WIDTH} in bf16 was compiled for {RECIPE_LEVELS} levels,
without padding and without dropout as well. A kernel has a row for each of its blocks: they are no larger than the
lengths need, and a few differ with dropout. A few registers of these spill, for the reasons that the module names:
{", ".join(f"{name} at head width {width}" for name, width in ALLOWED_SPILLS)}. Nothing else spills.

Registers and spilled bytes are of a thread, shared bytes of a block of threads. Resident warps are what registers and
shared memory let a multiprocessor run at once, of {SM_WARPS}; for 8.x the shared memory is that of 8.6 and 8.9,
{BLOCK_BYTES[80]:,} bytes a block. Slots are what a scheduler issues in the innermost loops for 64 queries by 64 keys of
a level. Float32 is multiplied without tensor cores, so as not to be cut to TF32; it was compiled for 8.0 and 9.0 alone.
"""


def traffic(batch: int, heads: int, queries: int, keys: int, levels: int, width: int) -> tuple[int, int]:
    """Bytes that forward and backward move at least, in half precision, by the kernels that take these lengths.

    Keys that one program reads twice, or blocks of one pair read next to each other, come from the L2 cache again.
    """
    q = torch.empty(batch, queries, heads, width, dtype=torch.bfloat16, device="meta")
    pairs = batch * heads
    of_queries, of_levels = pairs * queries * width * 2, 2 * pairs * keys * width * 2 * levels
    statistics = pairs * levels * queries * 4
    kernels = backward_kernels(q, (keys,) * levels, 1)
    forward = 2 * of_queries + of_levels + statistics
    # Each reads queries and their slopes, levels and the log-sum-exp; D is written by the first and read by the second.
    backward = len(kernels) * (2 * of_queries + of_levels + 2 * statistics) + of_queries + of_levels
    return forward, backward


def traffic_table() -> str:
    """Bytes moved by the recipe `base` at six levels."""
    rows = ["| reading | forward, MB | backward, MB | backward's kernels |", "| --- | ---: | ---: | --- |"]
    for name, queries, keys in (("text reads image", TEXT, IMAGE), ("image reads text", IMAGE, TEXT)):
        forward, backward = traffic(64, 12, queries, keys, 6, RECIPE_WIDTH)
        q = torch.empty(1, queries, 1, RECIPE_WIDTH, dtype=torch.bfloat16, device="meta")
        kernels = ", ".join(backward_kernels(q, (keys,), 1))
        rows.append(f"| {name} | {forward / 1e6:.0f} | {backward / 1e6:.0f} | {kernels} |")
    return "\n".join(rows)


def run_under(version: str, arguments: list[str]) -> int:
    """Run this module again with another version of triton, fetched once; its status."""
    folder = ROOT / ".cache" / f"triton-{version}"
    if not folder.exists():
        print(f"fetching triton {version}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"triton=={version}"]
        with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as staging:
            subprocess.run([*pip, "--target", f"{staging}/triton"], check=True)
            Path(staging, "triton").rename(folder)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), _OTHER_TRITON: "1"}
    command = [sys.executable, "-m", "benchmarks.kernel_static", *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


@exit_with_status
def main(argv: list[str] | None = None) -> int | None:
    """Compile the table and write what came of it."""
    parser = CommandParser(prog="python -m benchmarks.kernel_static", description=__doc__)
    parser.add_argument("--search", action="store_true", help="find the table's entries again, in about half an hour")
    parser.add_argument(
        "--widths", type=int, nargs="+", choices=HEAD_WIDTHS, default=HEAD_WIDTHS, help="heads' widths (default: all)"
    )
    parser.add_argument("--recompile", action="store_true", help="compile the recorded entries, too")
    parser.add_argument("--triton", metavar="VERSION", help="check the table under this Triton, and write no report")
    parser.add_argument("--json", type=Path, help="write the metrics as JSON lines to this file, and no report")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "kernel_static.md",
        help="report to write (default: %(default)s)",
    )
    args: argparse.Namespace = parser.parse_args(argv)
    if tuple(args.widths) != HEAD_WIDTHS and not (args.json or args.triton):
        parser.error("--widths: the report and the record have all widths; give --json FILE as well")
    if args.triton and args.triton != triton.__version__:
        return run_under(args.triton, sys.argv[1:] if argv is None else argv)
    if args.recompile:
        os.environ[_RECOMPILE] = os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    if args.search:
        search()
        return None
    measured = measure_all(table_builds(args.widths), "compiling")
    rows = [
        {"content": content, **asdict(build), **(asdict(usage) if usage else {})}
        for build, (content, usage) in measured.items()
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if args.json:
        args.json.write_text(lines)
        return None
    good = {build: usage for build, (_, usage) in measured.items() if usage and fits(usage, build)}
    if failed := [build for build in measured if build not in good]:
        raise SystemExit("\n".join(f"does not fit: {build}: {measured[build][1]}" for build in failed))
    if args.triton:
        print(f"{len(good)} kernels, all of which fit under triton {triton.__version__}")
        return None
    memory = f"## Memory traffic\n\nBy count, for 64 pairs of the recipe `base` at six levels.\n\n{traffic_table()}"
    write_report(args.out, "The Triton kernels' machine code", f"{INTRODUCTION}\n{memory}\n\n{table(good)}")
    args.out.with_suffix(".jsonl").write_text(lines)
    print(f"{len(good)} kernels, all of which fit: {args.out}")
    return None


if __name__ == "__main__":
    main()
