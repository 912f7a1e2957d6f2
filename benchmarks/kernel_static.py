"""What the Triton kernels are compiled to, with no GPU: registers, spills, shared memory, matrix instructions.

The report has every entry of the table of blocks for compute capabilities 8.0, 9.0 and 10.0, with seven levels, gate,
padding and dropout. Fewer levels or arguments can take more registers, so the recipes' head width, 64, is compiled with
others too. The numbers are read from the machine code.

An entry compiles in seconds. `RECORD` has the numbers of each entry by Triton's cache key: source, options, target,
variables, and versions of Triton and ptxas. Entries without a record are compiled. ``--recompile`` compiles all.

Source: triton.compile for a named target; cuobjdump and nvdisasm, which come with triton.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key

import unimo3  # noqa: F401  (it makes torchvision importable)
from benchmarks.report import ROOT, usable_cores, write_report
from unimo3.errors import CommandParser, exit_with_status
from unimo3.kernels.cross_layer_attention import HEAD_WIDTHS, kernel
from unimo3.kernels.cross_layer_attention.blocks import CAPABILITIES, KERNELS, SHORT_LENGTH, WIDTHS, Blocks, entry

LEVELS = 7
# Of the recipes: their heads, and the levels that their layers see besides.
RECIPE_WIDTH, RECIPE_LEVELS = 64, (1, 2, 6)
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Shared memory: of a block, where 80 stands for all of 8.x; of a multiprocessor. CUDA keeps 1 KiB a block.
BLOCK_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SM_BYTES = {80: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SM_REGISTERS, SM_WARPS, SM_BLOCKS, MIN_WARPS = 65536, 64, 32, 8
RECORD = ROOT / "benchmarks" / "results" / "kernel_static.jsonl"
# Processes of a pool take it from here.
_RECOMPILE = "KERNEL_STATIC_RECOMPILE"
_FUNCTIONS = {
    "forward": kernel.cross_layer_attention_fwd_kernel,
    "backward_query": kernel.cross_layer_attention_bwd_query_kernel,
    "backward_key": kernel.cross_layer_attention_bwd_key_kernel,
}
_MATRIX_INSTRUCTION = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")


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


@dataclass(frozen=True)
class Resources:
    """Of a compiled kernel.

    Attributes:
        registers: of a thread.
        local_bytes: of a thread: what did not fit its registers.
        shared_bytes: of a block of threads.
        matrix_instructions: in the machine code, for tensor cores.
    """

    registers: int
    local_bytes: int
    shared_bytes: int
    matrix_instructions: int

    def resident_warps(self, capability: int, warps: int) -> int:
        """Warps resident on a multiprocessor at once; registers are allocated by 256 a warp."""
        warp_registers = -(-self.registers * 32 // 256) * 256
        blocks = min(
            SM_REGISTERS // (warp_registers * warps),
            SM_BYTES[capability] // (self.shared_bytes + 1024),
            SM_WARPS // warps,
            SM_BLOCKS,
        )
        return blocks * warps

    def fits(self, build: Build) -> bool:
        """Whether nothing spills, the shared memory is there, and enough warps are resident to hide latencies."""
        return (
            self.local_bytes == 0
            and self.shared_bytes <= BLOCK_BYTES[build.capability]
            and self.resident_warps(build.capability, build.blocks.warps) >= MIN_WARPS
        )


def table_builds(widths: Sequence[int]) -> list[Build]:
    """Every entry of the table, for each dtype and each of these head widths it supports."""
    builds = {
        build: None
        for capability, dtype, width, name, length in itertools.product(
            CAPABILITIES, TYPES, widths, KERNELS, (SHORT_LENGTH, SHORT_LENGTH + 1)
        )
        for build in variants(
            Build(name, TYPES[dtype], width, capability, entry(name, dtype, width, length, capability))
        )
    }
    return list(builds)


def variants(build: Build) -> list[Build]:
    """A build, and with other levels and arguments what of it the recipes run."""
    if build.width != RECIPE_WIDTH or build.dtype != "bf16":
        return [build]
    others = itertools.product((*RECIPE_LEVELS, LEVELS), (False, True), (False, True))
    return [build] + [
        replace(build, levels=levels, masked=masked, dropout=dropout)
        for levels, masked, dropout in others
        if (levels, masked, dropout) != (build.levels, build.masked, build.dropout)
    ]


def source_of(build: Build) -> ASTSource:
    """The source to compile, as a model calls it: contiguous rows, every pointer and stride a multiple of 16."""
    fn = _FUNCTIONS[build.kernel]
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
    by_level = {
        **dict.fromkeys(("ks", "vs", "grad_ks", "grad_vs"), (pointer,) * levels),
        **dict.fromkeys(("k_strides", "v_strides"), (("i32",) * 4,) * levels),
        # As launch.py gives them: queries stand for masks and seeds that are not there.
        "masks": ("*u8" if build.masked else pointer,) * levels,
        **dict.fromkeys(("mask_strides", "lengths"), ("i32",) * levels),
    }
    plain = {
        **dict.fromkeys(("q", "out", "grad_out", "grad_q"), pointer),
        **dict.fromkeys(("gate", "lse", "offsets"), "*fp32"),
        **dict.fromkeys(
            ("q_strides", "gate_strides", "out_strides", "grad_out_strides", "grad_q_strides"), ("i32",) * 4
        ),
        **dict.fromkeys(("scale", "dropout_p"), "fp32"),
        **dict.fromkeys(("longest", "num_heads", "num_queries"), "i32"),
        "seed": "*i64" if build.dropout else pointer,
    }
    signature = {name: (by_level | plain).get(name, "constexpr") for name in fn.arg_names}
    even = [["tt.divisibility", 16]]
    attributes: dict[tuple[int, ...], list] = {}
    for index, name in enumerate(fn.arg_names):
        kind = signature[name]
        if name in ("ks", "vs", "grad_ks", "grad_vs"):
            attributes |= {(index, level): even for level in range(levels)}
        elif name in ("k_strides", "v_strides"):
            attributes |= {(index, level, axis): even for level in range(levels) for axis in range(3)}
        elif name.endswith("_strides") and name not in ("gate_strides", "mask_strides"):
            attributes |= {(index, axis): even for axis in range(3)}
        elif isinstance(kind, str) and kind.startswith("*"):
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
    return content, _read(compiled.asm["cubin"], compiled.metadata.shared)


def _read(cubin: bytes, shared_bytes: int) -> Resources:
    tools = Path(nvidia.__file__).parent / "bin"

    def read(tool: str, *options: str) -> str:
        return subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = read("cuobjdump", "--dump-resource-usage")
        code = read("nvdisasm", "-c", "-ndf")  # without dataflow analysis, which is not read
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|LOCAL|STACK):(\d+)", usage)}
    count = len(_MATRIX_INSTRUCTION.findall(code))
    return Resources(numbers["REG"], numbers["LOCAL"] + numbers["STACK"], shared_bytes, count)


def measure_all(builds: list[Build], what: str) -> dict[Build, tuple[str, Resources | None]]:
    """Each build's content and resources, by as many processes as there are cores."""
    with ProcessPoolExecutor(usable_cores()) as pool:
        done = tqdm(pool.map(measure, builds), total=len(builds), desc=what, mininterval=5)
        return dict(zip(builds, done, strict=True))


def candidates(name: str, dtypes: Sequence[str], width: int, capabilities: Sequence[int]) -> dict[Blocks, list[Build]]:
    """Blocks that `best` chooses from, each with all builds that it would support.

    Args:
        width: one of `WIDTHS`; heads that are padded to it are supported.
    """
    sizes = (16, 32, 64) if "fp32" in dtypes else (32, 64)
    supported = [head for head in HEAD_WIDTHS if triton.next_power_of_2(head) == width]
    return {
        blocks: [
            build
            for dtype, head, capability in itertools.product(dtypes, supported, capabilities)
            for build in variants(Build(name, dtype, head, capability, blocks))
        ]
        for blocks in itertools.starmap(Blocks, itertools.product(sizes, sizes, (4, 8), (2,)))
        # Larger ones spill in float32.
        if "fp32" not in dtypes or 512 <= blocks.queries * blocks.keys <= 2048
    }


def best(name: str, measured: dict[Blocks, list[tuple[Build, Resources]]], owned: int | None) -> Blocks | None:
    """The largest of blocks that fit; then the most warps resident; then the fewest registers.

    Args:
        measured: by `blocks`, what it takes of each build it would support; none where one does not fit.
        owned: size of the block a program owns, if there is one of that size; else any, but none above it.
    """

    def owned_by(blocks: Blocks) -> int:
        return blocks.keys if name == "backward_key" else blocks.queries

    def rank(blocks: Blocks) -> tuple[int, int, int]:
        registers = max(usage.registers for _, usage in measured[blocks])
        resident = min(usage.resident_warps(build.capability, blocks.warps) for build, usage in measured[blocks])
        return blocks.queries * blocks.keys, resident, -registers

    fitting = [blocks for blocks in measured if measured[blocks]]
    if owned:
        fitting = [blocks for blocks in fitting if owned_by(blocks) == owned] or [
            blocks for blocks in fitting if owned_by(blocks) < owned
        ]
    return max(fitting, key=rank, default=None)


def search() -> None:
    """Print the entries that the rule of `best` gives, as they stand in blocks.py."""
    groups: list[tuple[tuple[str, ...], tuple[int, ...]]] = [
        *((("fp16", "bf16"), (capability,)) for capability in CAPABILITIES),
        (("fp32",), CAPABILITIES),
    ]
    for (dtypes, capabilities), name, width in itertools.product(groups, KERNELS, WIDTHS):
        builds = candidates(name, dtypes, width, capabilities)
        flat = measure_all(list(itertools.chain(*builds.values())), f"{dtypes} {capabilities} {name} {width}")
        measured: dict[Blocks, list[tuple[Build, Resources]]] = {}
        for blocks, supported in builds.items():
            fitting = [(build, usage) for build in supported if (usage := flat[build][1]) and usage.fits(build)]
            measured[blocks] = fitting if len(fitting) == len(supported) else []
        owned = (None,) if dtypes == ("fp32",) else (SHORT_LENGTH, 64)
        chosen = ", ".join(str(best(name, measured, size)) for size in owned)
        print(f"{dtypes} {capabilities} {(name, width)}: {chosen}", flush=True)


def table(measured: dict[Build, Resources]) -> str:
    """The result in markdown."""
    lines = []
    for capability in CAPABILITIES:
        lines += [
            f"## sm_{capability}",
            "",
            "| kernel | dtype | head width | queries x keys | warps | registers | spilled bytes | shared bytes | "
            "matrix instructions | resident warps |",
            "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for build, usage in measured.items():
            if build.capability == capability and build == replace(build, levels=LEVELS, masked=True, dropout=True):
                blocks, resident = build.blocks, usage.resident_warps(capability, build.blocks.warps)
                lines.append(
                    f"| {build.kernel} | {build.dtype} | {build.width} | {blocks.queries} x {blocks.keys} | "
                    f"{blocks.warps} | {usage.registers} | {usage.local_bytes} | {usage.shared_bytes:,} | "
                    f"{usage.matrix_instructions} | {resident} |"
                )
        lines.append("")
    return "\n".join(lines)


INTRODUCTION = f"""Compiled by triton {triton.__version__} for GPUs this machine does not have; nothing was run.
{LEVELS} levels, gate, padding and dropout; head width {RECIPE_WIDTH} in bf16 was compiled for {RECIPE_LEVELS} levels,
without padding and without dropout as well, and none of these spills either. Where a kernel has two rows, the first is
for up to {SHORT_LENGTH} queries (keys for backward_key), the second for more; a single row supports both.

Registers and spilled bytes are of a thread, shared bytes of a block of threads. Resident warps are what registers and
shared memory let a multiprocessor run at once, of {SM_WARPS}; for 8.x the shared memory is that of 8.6 and 8.9,
{BLOCK_BYTES[80]:,} bytes a block. Float32 is multiplied without tensor cores, so as not to be cut to TF32.
"""


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Compile the table and write what came of it."""
    parser = CommandParser(prog="python -m benchmarks.kernel_static", description=__doc__)
    parser.add_argument("--search", action="store_true", help="find the table's entries again, in about half an hour")
    parser.add_argument(
        "--widths", type=int, nargs="+", choices=HEAD_WIDTHS, default=HEAD_WIDTHS, help="heads' widths (default: all)"
    )
    parser.add_argument("--recompile", action="store_true", help="compile the recorded entries, too")
    parser.add_argument("--json", type=Path, help="write the metrics as JSON lines to this file, and no report")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "kernel_static.md",
        help="report to write (default: %(default)s)",
    )
    args: argparse.Namespace = parser.parse_args(argv)
    if tuple(args.widths) != HEAD_WIDTHS and not args.json:
        parser.error("--widths: the report and the record have all widths; give --json FILE as well")
    if args.recompile:
        os.environ[_RECOMPILE] = os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    if args.search:
        search()
        return
    measured = measure_all(table_builds(args.widths), "compiling")
    rows = [
        {"content": content, **asdict(build), **(asdict(usage) if usage else {})}
        for build, (content, usage) in measured.items()
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if args.json:
        args.json.write_text(lines)
        return
    good = {build: usage for build, (_, usage) in measured.items() if usage and usage.fits(build)}
    if failed := [build for build in measured if build not in good]:
        raise SystemExit("\n".join(f"does not fit: {build}: {measured[build][1]}" for build in failed))
    write_report(args.out, "The Triton kernels' machine code", INTRODUCTION + "\n" + table(good))
    args.out.with_suffix(".jsonl").write_text(lines)
    print(f"{len(good)} kernels, none of which spills: {args.out}")


if __name__ == "__main__":
    main()
