"""The command line that the planners of pretraining and fine-tuning share: the machine, the settings, the plan.

Source: none.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from unimo3.errors import CommandParser, ConfigError
from unimo3.training.ds_config import DS_CONFIGS
from unimo3.training.plan.settings import Fabric, Machine

if TYPE_CHECKING:
    from unimo3.training.plan.make import PlannedRun

_GB = 10**9
_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
# One H100 SXM, without sparsity; torch multiplies float32 as such, not as TF32.
_H100_TFLOPS = {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0}


def machine_parser(program: str, description: str | None, epilog: str) -> CommandParser:
    """A parser of the arguments that describe the machine, and of those that control the plan.

    Args:
        program: how users start it.
        epilog: the help's last paragraph: whose settings it also takes.
    """
    parser = CommandParser(prog=program, description=description, allow_abbrev=False, epilog=epilog)
    parser.add_argument("--gpus", type=int, help="GPUs of all nodes, one rank each")
    parser.add_argument(
        "--gpu-memory", default="80GB", help="memory of one GPU, such as 80GB or 40GiB (default: %(default)s)"
    )
    parser.add_argument(
        "--reserve",
        type=float,
        default=0.1,
        help="fraction of GPU memory to leave free, for CUDA, NCCL and fragmentation (default: %(default)s)",
    )
    parser.add_argument(
        "--ds-config", help=f"the only DeepSpeed configuration to consider (default: all of {DS_CONFIGS.name}/)"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="fraction of the peak that computation reaches, recomputation counted as work (default: %(default)s)",
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="peak of one GPU, 10^12 operations a second (default: an H100's, 989 in bf16 and fp16, 67 in fp32)",
    )
    fabric = Fabric()
    parser.add_argument(
        "--gpus-per-node", type=int, default=fabric.gpus_per_node, help="GPUs of a node (default: %(default)s)"
    )
    parser.add_argument(
        "--node-bandwidth",
        type=float,
        default=fabric.node_bytes_s / _GB,
        help="GB/s that a GPU receives from the GPUs of its node (default: NVLink 4, %(default)g)",
    )
    parser.add_argument(
        "--network-bandwidth",
        type=float,
        default=fabric.network_bytes_s / _GB,
        help="GB/s a GPU that a node receives from other nodes (default: 400 Gb/s InfiniBand a GPU, %(default)g)",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        default=fabric.overlap,
        help="fraction of the time between ranks that computation hides (default: %(default)g, an upper bound)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, in bytes, operations and seconds")
    return parser


def machine_of(args: argparse.Namespace) -> Machine:
    """The machine that the arguments describe.

    Raises:
        ConfigError: an argument is missing or out of range.
    """
    errors = []
    if args.gpus is None:
        errors.append("--gpus: not given; give the number of GPUs of the run")
    elif args.gpus < 1:
        errors.append(f"--gpus {args.gpus}: at least 1 is needed")
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", args.gpu_memory.strip().upper())
    unit = _UNITS.get(size[2]) if size else None
    if size is None or unit is None or float(size[1]) == 0:
        errors.append(f"--gpu-memory {args.gpu_memory}: a size such as 80GB, 80GiB or 40000MB is needed")
    if not 0 <= args.reserve < 1:
        errors.append(f"--reserve {args.reserve}: a fraction of at least 0 and below 1 is needed")
    if not 0 < args.mfu <= 1:
        errors.append(f"--mfu {args.mfu}: a fraction above 0 and at most 1 is needed")
    if args.peak_tflops is not None and not 0 < args.peak_tflops < math.inf:
        errors.append(f"--peak-tflops {args.peak_tflops}: a number above 0 is needed")
    if args.gpus_per_node < 1:
        errors.append(f"--gpus-per-node {args.gpus_per_node}: at least 1 is needed")
    for name, value in (("node", args.node_bandwidth), ("network", args.network_bandwidth)):
        if not 0 < value < math.inf:
            errors.append(f"--{name}-bandwidth {value:g}: a number of GB/s above 0 is needed")
    if not 0 <= args.overlap <= 1:
        errors.append(f"--overlap {args.overlap:g}: a fraction from 0 to 1 is needed")
    if errors:
        raise ConfigError(errors)
    assert size is not None
    assert unit is not None
    peaks = {precision: (args.peak_tflops or peak) * 1e12 for precision, peak in _H100_TFLOPS.items()}
    fabric = Fabric(args.gpus_per_node, args.node_bandwidth * _GB, args.network_bandwidth * _GB, args.overlap)
    return Machine(args.gpus, int(float(size[1]) * unit), args.reserve, peaks, args.mfu, fabric)


def print_plan(args: argparse.Namespace, rest: list[str], read_run: Callable[[list[str]], PlannedRun]) -> None:
    """Plan a run, and print the plan.

    Args:
        args: of `machine_parser`.
        rest: the run's settings, as arguments.
        read_run: makes a run of settings.

    Raises:
        ConfigError: the machine or the settings are invalid, all in one message; or there is no plan, see `make_plan`.
    """
    if args.ds_config is not None:
        rest = [*rest, "--training.ds_config", args.ds_config]  # checked with the rest
    errors = []
    try:
        machine = machine_of(args)
    except ConfigError as error:
        errors += error.errors
    try:
        run = read_run(rest)
    except ConfigError as error:
        errors += error.errors
    if errors:
        raise ConfigError(errors)
    from unimo3.training.plan.make import make_plan
    from unimo3.training.plan.report import plan_text

    plan = make_plan(run, machine, args.ds_config)
    print(json.dumps(plan, indent=2) if args.json else plan_text(plan))
