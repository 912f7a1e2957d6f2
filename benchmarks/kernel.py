"""Cross-layer attention by itself: this project's kernel against what PyTorch offers for the same sum.

    separate          S calls of scaled_dot_product_attention, then the sum weighed by the gate
    stacked           one call with the levels as further batch entries, then the sum
    stacked_compiled  torch.compile of that
    flex              S calls of compiled FlexAttention, then the sum (GPU: it has no backward pass on CPUs)

Source: torch.nn.functional.scaled_dot_product_attention; torch.nn.attention.flex_attention.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

import unimo3  # noqa: F401  (it makes torchvision importable)
from benchmarks.report import ROOT, usable_cores, write_report
from unimo3.errors import CommandParser, ConfigError, exit_with_status
from unimo3.kernels.cross_layer_attention import cross_layer_attention

OURS, SEPARATE, STACKED, COMPILED, FLEX = "ours", "separate", "stacked", "stacked_compiled", "flex"
GPU_CONTESTANTS = (OURS, SEPARATE, STACKED, COMPILED, FLEX)
CPU_CONTESTANTS = (OURS, SEPARATE, STACKED, COMPILED)
NUM_WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """One size: B samples of H heads, T queries, V keys a level, S levels, head width d."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    levels: int
    padded: bool
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        """Operations forward: two products of queries, keys and width a level; backward has five."""
        return 4 * self.batch * self.heads * self.queries * self.keys * self.width * self.levels

    @property
    def num_bytes(self) -> int:
        """Of q, k, v, the result and their gradients, each moved once: the least that forward and backward can."""
        query_values = self.queries * self.width
        levels = 2 * self.keys * self.width * self.levels
        # Forward reads q, k and v and writes the result; backward reads these and its gradient and writes three.
        return self.batch * self.heads * self.dtype.itemsize * (5 * query_values + 3 * levels)

    @property
    def label(self) -> str:
        """For a row of the table."""
        return (
            f"{self.name}, T {self.queries}, V {self.keys}, S {self.levels}, {str(self.dtype).removeprefix('torch.')}"
        )


def gpu_cases() -> list[Case]:
    """Sizes of the recipes, in both directions, and long ones."""
    sizes = [
        ("base", 64, 12, 50, 325, range(1, 7)),
        ("large", 32, 16, 50, 442, (1, 6)),
        ("long", 8, 12, 512, 1025, (1, 6)),
    ]
    return [
        Case(name, batch, heads, *tokens, 64, levels, padded, dtype)
        for name, batch, heads, text, image, depths in sizes
        for tokens, padded in (((text, image), False), ((image, text), True))
        for levels in depths
        for dtype in (torch.float16, torch.bfloat16)
    ]


def cpu_cases() -> list[Case]:
    """What `tiny` and the step benchmark's `cpu` size run, twice their pairs: MLM's and ITM's."""
    sizes = [("tiny", 64, 4, 28, 17, 32, (1, 3)), ("cpu", 64, 4, 32, 37, 64, (1, 6))]
    return [
        Case(name, batch, heads, *tokens, width, levels, padded, torch.float32)
        for name, batch, heads, text, image, width, depths in sizes
        for tokens, padded in (((text, image), False), ((image, text), True))
        for levels in depths
    ]


def draw(case: Case, device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Inputs as the model makes them, and a gradient of the output."""
    torch.manual_seed(0)

    def heads(tokens: int) -> Tensor:
        # A linear map's output, seen as heads.
        drawn = torch.randn(case.batch, tokens, case.heads, case.width, device=device, dtype=case.dtype)
        return drawn.transpose(1, 2)

    k, v = ([heads(case.keys).contiguous().requires_grad_() for _ in range(case.levels)] for _ in range(2))
    logits = torch.randn(case.batch, case.queries, case.heads, case.levels, device=device)
    lengths = torch.randint(case.keys // 2, case.keys + 1, (case.batch, 1), device=device)
    mask = torch.arange(case.keys, device=device) < lengths if case.padded else None
    inputs = {"q": heads(case.queries).requires_grad_(), "k": k, "v": v, "gate": logits.softmax(-1).requires_grad_()}
    return inputs | {"mask": mask}, heads(case.queries)


def ours(q: Tensor, k: list[Tensor], v: list[Tensor], gate: Tensor, mask: Tensor | None) -> Tensor:
    """This project's kernel for the device."""
    return cross_layer_attention(q, k, v, gate, mask, impl="triton" if q.is_cuda else "native")


def separate(q: Tensor, k: list[Tensor], v: list[Tensor], gate: Tensor, mask: Tensor | None) -> Tensor:
    """A call for each level."""
    bias = None if mask is None else mask[:, None, None, :]
    gates = gate.to(q.dtype).transpose(1, 2).unsqueeze(-1).unbind(3)
    each = zip(gates, k, v, strict=True)
    return sum(weight * scaled_dot_product_attention(q, key, value, bias) for weight, key, value in each)  # type: ignore[return-value]


def stacked(q: Tensor, k: list[Tensor], v: list[Tensor], gate: Tensor, mask: Tensor | None) -> Tensor:
    """All levels in one call."""
    levels = len(k)
    keys, values = torch.stack(k, 1).flatten(0, 1), torch.stack(v, 1).flatten(0, 1)
    queries = q.unsqueeze(1).expand(-1, levels, -1, -1, -1).flatten(0, 1)
    bias = None if mask is None else mask.repeat_interleave(levels, 0)[:, None, None, :]
    out = scaled_dot_product_attention(queries, keys, values, bias).unflatten(0, (-1, levels))
    return torch.einsum("bshtd,bths->bhtd", out, gate.to(q.dtype))


def build(name: str) -> Callable[..., Tensor]:
    """A contestant by name."""
    if name == COMPILED:
        return torch.compile(stacked, dynamic=False)
    if name == FLEX:
        return _flex()
    return {OURS: ours, SEPARATE: separate, STACKED: stacked}[name]


def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: list[Tensor], v: list[Tensor], gate: Tensor, mask: Tensor | None) -> Tensor:
        def padding(score: Tensor, b: Tensor, h: Tensor, t: Tensor, key: Tensor) -> Tensor:
            return torch.where(mask[b, key], score, -torch.inf)  # type: ignore[index]

        gates = gate.to(q.dtype).transpose(1, 2).unsqueeze(-1).unbind(3)
        each = zip(gates, k, v, strict=True)
        change = None if mask is None else padding
        return sum(weight * compiled(q, key, value, change) for weight, key, value in each)  # type: ignore[return-value]

    return attend


@dataclass
class Timing:
    """Medians in seconds, and bytes above the inputs at the most (GPU alone)."""

    forward_s: float
    backward_s: float
    both_s: float
    peak_bytes: int | None


def measure(case: Case, names: tuple[str, ...], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Time all contestants in turns, so that whatever else the machine does hits them alike."""
    # A contestant is compiled for at most so many sizes, and runs plainly afterwards.
    torch._dynamo.reset()
    inputs, grad = draw(case, device)
    leaves = [inputs["q"], inputs["gate"], *inputs["k"], *inputs["v"]]
    contestants = {name: build(name) for name in names}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    peaks: dict[str, int | None] = dict.fromkeys(names)
    for number in range(NUM_WARM_UP + rounds):
        for name, attend in contestants.items():
            before = _start_memory(device)
            out, forward_s = _timed(lambda attend=attend: attend(**inputs), device)
            grads, backward_s = _timed(lambda out=out: torch.autograd.grad(out, leaves, grad), device)
            if number >= NUM_WARM_UP:
                seconds[name].append((forward_s, backward_s))
                # What all must return is not counted.
                due = sum(tensor.numel() * tensor.element_size() for tensor in (out, *grads))
                peaks[name] = None if before is None else torch.cuda.max_memory_allocated() - before - due
            del out, grads
    return {
        name: Timing(
            median(one for one, _ in taken), median(two for _, two in taken), median(map(sum, taken)), peaks[name]
        )
        for name, taken in seconds.items()
    }


def _start_memory(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = work()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begun


def roof(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a large matrix product, and bytes a second of a large copy, measured here."""
    side, count = (8192, 2**28) if device.type == "cuda" else (1536, 2**24)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = median(_timed(lambda: a @ b, device)[1] for _ in range(7))
    copy = median(_timed(lambda: target.copy_(source), device)[1] for _ in range(7))
    return 2 * side**3 / product, 2 * count / copy


def table(results: dict[Case, dict[str, Timing]]) -> str:
    """A row a case and contestant, and how many times the best other's speed ours has."""
    lines = [
        "| case | | forward, ms | backward, ms | both, ms | TFLOP/s | GB/s | extra memory, MiB | ours is |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case, timings in results.items():
        for name, timing in timings.items():
            times = [f"{value * 1e3:.3f}" for value in (timing.forward_s, timing.backward_s, timing.both_s)]
            memory = "" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:.1f}"
            rate = f"{3.5 * case.flops / timing.both_s / 1e12:.3f}"
            ratio = "" if name == OURS else f"{timing.both_s / timings[OURS].both_s:.2f} times as fast"
            moved = f"{case.num_bytes / timing.both_s / 1e9:.1f}"
            lines.append(f"| {case.label} | {name} | {' | '.join(times)} | {rate} | {moved} | {memory} | {ratio} |")
    return "\n".join(lines)


METHOD = """\
S levels, T queries, V keys a level. separate: S calls of scaled_dot_product_attention and a gate-weighted sum; stacked:
one call with the levels as further batch entries; stacked_compiled: torch.compile of that.

Forward, backward to all inputs, and both, in medians of {rounds} rounds in which all take their turn. No dropout; the
gate is float32; where texts are read, half to all of their tokens are real. Operations are counted as 3.5 times the two
products forward, whatever a contestant computes again; bytes are those of inputs, result and gradients, each moved
once. A product of two large matrices reached {flops:.2f} TFLOP/s here, a copy {bandwidth:.1f} GB/s. Extra memory is the
most above inputs, result and gradients, on GPUs alone."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: something cannot be used.
    """
    parser = CommandParser(prog="python -m benchmarks.kernel", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="the CPU's sizes, in float32")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of each case (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", help="only cases of these names")
    parser.add_argument("--contestants", nargs="+", choices=GPU_CONTESTANTS, help="only these and ours")
    parser.add_argument("--out", type=Path, help="file of the result; benchmarks/results/kernel_DEVICE.md by default")
    args = parser.parse_args(arguments)
    errors = []
    if args.rounds < 1:
        errors.append(f"--rounds {args.rounds}: at least 1 is needed")
    if not args.cpu and not torch.cuda.is_available():
        errors.append("no GPU is found; use --cpu")
    if args.cpu and FLEX in (args.contestants or ()):
        errors.append(f"--contestants {FLEX}: has no backward pass on CPUs; leave it out")
    known = {case.name for case in (cpu_cases() if args.cpu else gpu_cases())}
    errors += [
        f"--cases {name}: one of {', '.join(sorted(known))} is supported" for name in set(args.cases or ()) - known
    ]
    if errors:
        raise ConfigError(errors)
    return args


@exit_with_status
def main(arguments: list[str] | None = None) -> None:
    """Measure, write the result and print it."""
    args = parse(arguments)
    device = torch.device("cpu" if args.cpu else "cuda")
    torch.set_num_threads(usable_cores())
    all_names = CPU_CONTESTANTS if args.cpu else GPU_CONTESTANTS
    names = tuple(name for name in all_names if name == OURS or not args.contestants or name in args.contestants)
    cases = [case for case in (cpu_cases() if args.cpu else gpu_cases()) if not args.cases or case.name in args.cases]
    results = {case: measure(case, names, args.rounds, device) for case in tqdm(cases, unit="case")}
    flops, bandwidth = roof(device, cases[0].dtype)
    method = METHOD.format(rounds=args.rounds, flops=flops / 1e12, bandwidth=bandwidth / 1e9)
    kind = "cpu" if args.cpu else torch.cuda.get_device_name().lower().replace(" ", "_")
    out = args.out or ROOT / "benchmarks" / "results" / f"kernel_{kind}.md"
    write_report(out, "Cross-layer attention by itself", f"{table(results)}\n\n{method}")
    print(f"\n{table(results)}\n\n{out}")


if __name__ == "__main__":
    main()
