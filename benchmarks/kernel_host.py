"""What a call of the Triton kernels costs the host, without a GPU: libcuda is a stub whose launches do nothing.

Python, autograd, triton's launcher and torch's allocations are real; tensors lie on the CPU. Times are those of this
thread's processor, so that other work on the machine does not count.

Source: triton's NVIDIA driver for the calls that the stub has to answer.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from unimo3.errors import CommandParser, ConfigError, exit_with_status

STUB = Path(__file__).with_name("libcuda_stub.c")
# Where this process, started again, finds the compiled stub.
_STUB_FOLDER = "KERNEL_HOST_STUB"
BATCH, HEADS, TEXT, IMAGE, WIDTH = 2, 12, 50, 325, 64
CALLS = 20


def start_with_stub(arguments: list[str]) -> int:
    """Run this module again where the dynamic linker finds the stub for libcuda.

    Raises:
        ConfigError: there is no C compiler.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise ConfigError("no C compiler is found; install gcc or set CC")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libcuda.so.1")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, STUB], check=True)
        Path(folder, "libcuda.so").symlink_to(library.name)
        environment = os.environ | {
            "LD_LIBRARY_PATH": folder,
            "TRITON_LIBCUDA_PATH": folder,
            "TRITON_INTERPRET": "0",
            "CUDA_VISIBLE_DEVICES": "",
            _STUB_FOLDER: folder,
        }
        command = [sys.executable, "-m", "benchmarks.kernel_host", *arguments]
        return subprocess.run(command, env=environment, check=False).returncode


def use_stub() -> None:
    """Have triton compile for an H100 and launch through the stub."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    from unimo3.kernels.cross_layer_attention import blocks

    class Driver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())
    blocks._capability = lambda device: 90


def microseconds(call: Callable[[], object], rounds: int) -> float:
    """Microseconds of this thread's processor for a call: the median of rounds of `CALLS`."""
    times = []
    for number in range(rounds + 2):
        begun = time.thread_time()
        for _ in range(CALLS):
            call()
        if number > 1:
            times.append((time.thread_time() - begun) / CALLS)
    return median(times) * 1e6


def measure(rounds: int) -> str:
    """A markdown table: a row a direction, number of levels and dropout."""
    import torch

    use_stub()
    from unimo3.kernels.cross_layer_attention import launch

    torch.set_num_threads(1)
    rows = [
        "| reading | levels | dropout | forward, us | forward and backward, us |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for name, queries, keys in (("text reads image", TEXT, IMAGE), ("image reads text", IMAGE, TEXT)):
        for num_levels in (1, 6):
            q = torch.empty(BATCH, queries, HEADS, WIDTH, dtype=torch.bfloat16).requires_grad_()
            levels = [
                torch.empty(BATCH, keys, 2, HEADS, WIDTH, dtype=torch.bfloat16).requires_grad_()
                for _ in range(num_levels)
            ]
            gate = torch.empty(BATCH, queries, HEADS, num_levels).requires_grad_() if num_levels > 1 else None
            masks = [torch.ones(BATCH, keys, dtype=torch.bool)]
            leaves = [q, *levels, *([] if gate is None else [gate])]
            grad_out = torch.empty_like(q)
            for dropout_p in (0.0, 0.1):

                def forward(dropout_p: float = dropout_p) -> torch.Tensor:
                    return launch.attend(q, levels, gate, masks, dropout_p)  # noqa: B023

                def both(dropout_p: float = dropout_p) -> None:
                    torch.autograd.grad(launch.attend(q, levels, gate, masks, dropout_p), leaves, grad_out)  # noqa: B023

                taken = f"{microseconds(forward, rounds):.0f} | {microseconds(both, rounds):.0f}"
                rows.append(f"| {name} | {num_levels} | {dropout_p or 'none'} | {taken} |")
                print(rows[-1], flush=True)
    return "\n".join(rows)


@exit_with_status
def main(arguments: list[str] | None = None) -> int | None:
    """Measure and write the result."""
    from benchmarks.report import ROOT, write_report

    parser = CommandParser(prog="python -m benchmarks.kernel_host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help=f"of {CALLS} calls each (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "kernel_host.md",
        help="report to write (default: %(default)s)",
    )
    args: argparse.Namespace = parser.parse_args(arguments)
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds}: at least 1 is needed")
    if _STUB_FOLDER not in os.environ:
        return start_with_stub(sys.argv[1:] if arguments is None else arguments)
    body = f"{measure(args.rounds)}\n\n{' '.join((__doc__ or '').split(chr(10) * 2)[1].split())}"
    write_report(args.out, "The host's time of a call of the Triton kernels", body)
    print(args.out)
    return None


if __name__ == "__main__":
    main()
