"""Cross-layer attention by itself: this project's kernel against what PyTorch offers for the same sum.

    separate          S calls of scaled_dot_product_attention, then the sum weighed by the gate
    cudnn, flash,     the same with one of its backends (GPU)
    efficient
    stacked           one call with the levels as further batch entries, then the sum
    stacked_compiled  torch.compile of that
    flex              S calls of compiled FlexAttention, then the sum (GPU, no dropout)

On a GPU, device time is that of a CUDA graph's replay after the L2 cache was emptied; the host's time to issue a call
is taken apart. torch and triton suffice.

Source: torch.nn.functional.scaled_dot_product_attention; torch.nn.attention.flex_attention; triton.testing for the
method.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.report import ROOT, write_report
from unimo3.errors import CommandParser, ConfigError, exit_with_status
from unimo3.kernels.cross_layer_attention import cross_layer_attention, cross_layer_attention_reference

OURS, SEPARATE, STACKED, COMPILED, FLEX = "ours", "separate", "stacked", "stacked_compiled", "flex"
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CPU_CONTESTANTS = (OURS, SEPARATE, STACKED, COMPILED)
GPU_CONTESTANTS = (OURS, SEPARATE, *BACKENDS, STACKED, COMPILED, FLEX)
DROPOUT_P = 0.1
NUM_WARM_UP = 3
FLUSHED_BYTES = 2**28  # several times the L2 cache of any GPU


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
    dropout_p: float = 0.0

    @property
    def flops(self) -> int:
        """Operations forward: two products of queries, keys and width a level; backward has five."""
        return 4 * self.batch * self.heads * self.queries * self.keys * self.width * self.levels

    @property
    def num_bytes(self) -> int:
        """Bytes of q, k, v, the result and their gradients, each moved once: the least that can be moved."""
        query_values = self.queries * self.width
        levels = 2 * self.keys * self.width * self.levels
        # Forward reads q, k and v and writes the result; backward reads these and its gradient and writes three.
        return self.batch * self.heads * self.dtype.itemsize * (5 * query_values + 3 * levels)

    @property
    def label(self) -> str:
        """For a row of the table."""
        dropout = f", dropout {self.dropout_p}" if self.dropout_p else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}, T {self.queries}, V {self.keys}, S {self.levels}, {dtype}{dropout}"


def gpu_cases() -> list[Case]:
    """Sizes of the recipes in both directions, and long ones; the most informative come first."""
    sizes = [
        ("base", 64, 12, 50, 325, (6, 1, 3, 2, 4, 5)),
        ("large", 32, 16, 50, 442, (6, 1)),
        ("long", 8, 12, 512, 1025, (6, 1)),
    ]
    plain = [
        Case(name, batch, heads, *tokens, 64, levels, padded, torch.bfloat16)
        for name, batch, heads, text, image, depths in sizes
        for levels in depths
        for tokens, padded in (((text, image), False), ((image, text), True))
    ]
    base = [case for case in plain if case.name == "base" and case.levels in (1, 6)]
    dropped = [replace(case, dropout_p=DROPOUT_P) for case in base]
    return [*base, *dropped, *(case for case in plain if case not in base), *(_in_half(case) for case in base)]


def _in_half(case: Case) -> Case:
    return replace(case, dtype=torch.float16)


def cpu_cases() -> list[Case]:
    """What `tiny` and the step benchmark's `cpu` size run, twice their pairs: MLM's and ITM's."""
    sizes = [("tiny", 64, 4, 28, 17, 32, (1, 3)), ("cpu", 64, 4, 32, 37, 64, (1, 6))]
    return [
        Case(name, batch, heads, *tokens, width, levels, padded, torch.float32, dropout_p)
        for name, batch, heads, text, image, width, depths in sizes
        for tokens, padded in (((text, image), False), ((image, text), True))
        for levels in depths
        for dropout_p in ((0.0, DROPOUT_P) if levels > 1 else (0.0,))
    ]


def draw(case: Case, device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Inputs as the model's linear maps give them, and a gradient of the output [B, T, H, d]."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=case.dtype)

    levels = [normal(case.batch, case.keys, 2, case.heads, case.width).requires_grad_() for _ in range(case.levels)]
    logits = torch.randn(case.batch, case.queries, case.heads, case.levels, device=device)
    lengths = torch.randint(case.keys // 2, case.keys + 1, (case.batch, 1), device=device)
    mask = torch.arange(case.keys, device=device) < lengths if case.padded else None
    q = normal(case.batch, case.queries, case.heads, case.width)
    inputs = {"q": q.requires_grad_(), "levels": levels, "gate": logits.softmax(-1).requires_grad_(), "mask": mask}
    return inputs | {"dropout_p": case.dropout_p}, torch.randn_like(q)


Attend = Callable[[Tensor, Sequence[Tensor], Tensor, Tensor | None, float], Tensor]


def ours(q: Tensor, levels: Sequence[Tensor], gate: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """This project's kernel for the device."""
    return cross_layer_attention(q, levels, gate, mask, "triton" if q.is_cuda else "native", dropout_p)


def separate(q: Tensor, levels: Sequence[Tensor], gate: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """A call for each level."""
    bias = None if mask is None else mask[:, None, None, :]
    q, gates = q.transpose(1, 2), gate.to(q.dtype).transpose(1, 2).unsqueeze(-1).unbind(3)
    each = ((weight, *level.transpose(1, 3).unbind(2)) for weight, level in zip(gates, levels, strict=True))
    mixed = sum(weight * scaled_dot_product_attention(q, key, value, bias, dropout_p) for weight, key, value in each)
    return mixed.transpose(1, 2)  # type: ignore[union-attr]


def stacked(q: Tensor, levels: Sequence[Tensor], gate: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """All levels in one call."""
    num_levels = len(levels)
    keys, values = torch.stack(list(levels), 1).flatten(0, 1).transpose(1, 3).unbind(2)
    queries = q.transpose(1, 2).unsqueeze(1).expand(-1, num_levels, -1, -1, -1).flatten(0, 1)
    bias = None if mask is None else mask.repeat_interleave(num_levels, 0)[:, None, None, :]
    out = scaled_dot_product_attention(queries, keys, values, bias, dropout_p).unflatten(0, (-1, num_levels))
    return torch.einsum("bshtd,bths->bthd", out, gate.to(q.dtype))


def build(name: str) -> Attend:
    """A contestant by name."""
    if name in BACKENDS:
        return _with_backend(BACKENDS[name])
    if name == COMPILED:
        return torch.compile(stacked, dynamic=False)
    if name == FLEX:
        return _flex()
    return {OURS: ours, SEPARATE: separate, STACKED: stacked}[name]


def _with_backend(backend: SDPBackend) -> Attend:
    def attend(*inputs: Any) -> Tensor:
        with sdpa_kernel(backend):
            return separate(*inputs)

    return attend


def _flex() -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, levels: Sequence[Tensor], gate: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
        if dropout_p:
            raise ValueError("FlexAttention has no dropout")

        def padding(score: Tensor, b: Tensor, h: Tensor, t: Tensor, key: Tensor) -> Tensor:
            return torch.where(mask[b, key], score, -torch.inf)  # type: ignore[index]

        q, gates = q.transpose(1, 2), gate.to(q.dtype).transpose(1, 2).unsqueeze(-1).unbind(3)
        each = ((weight, *level.transpose(1, 3).unbind(2)) for weight, level in zip(gates, levels, strict=True))
        change = None if mask is None else padding
        return sum(weight * compiled(q, key, value, change) for weight, key, value in each).transpose(1, 2)  # type: ignore[union-attr]

    return attend


@dataclass
class Result:
    """What was measured of one contestant: medians in seconds.

    Attributes:
        host_s: of the CPU to issue forward and backward (GPU).
        peak_bytes: above inputs, result and gradients at the most (GPU).
        error: largest error of the result and of any gradient, relative to the largest value in float64; None with
            dropout, since each contestant drops others.
    """

    forward_s: float
    both_s: float
    host_s: float | None
    peak_bytes: int | None
    error: float | None


def measure(case: Case, names: Sequence[str], rounds: int, device: torch.device) -> dict[str, Result | str]:
    """Each contestant's result, or why it has none.

    They take turns, so that whatever else the machine does hits them alike.
    """
    # A contestant is compiled for at most so many sizes, and runs plainly afterwards.
    torch._dynamo.reset()
    inputs, grad = draw(case, device)
    arguments = tuple(inputs.values())
    leaves = [inputs["q"], inputs["gate"], *inputs["levels"]]
    exact = _exact(inputs, grad) if not case.dropout_p else None
    results: dict[str, Result | str] = {}
    works: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for name in names:
        try:
            attend = build(name)

            def forward(attend: Attend = attend) -> Tensor:
                return attend(*arguments)

            def both(attend: Attend = attend) -> list[Tensor]:
                out = attend(*arguments)
                return [out, *torch.autograd.grad(out, leaves, grad)]

            error = largest_error(both(), exact) if exact else None
            host_s, peak_bytes = _host_and_memory(both, device)
            works[name] = _replayed(forward, device), _replayed(both, device)
            results[name] = Result(0, 0, host_s, peak_bytes, error)
        except Exception as reason:  # torch's own, of any type: a backend that does not take the case, memory
            results[name] = f"{type(reason).__name__}: {str(reason).splitlines()[0]}"
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for number in range(NUM_WARM_UP + rounds):
        for name, (run_forward, run_both) in works.items():
            taken = _timed(run_forward, device), _timed(run_both, device)
            if number >= NUM_WARM_UP:
                seconds[name].append(taken)
    for name, taken_s in seconds.items():
        result = results[name]
        assert isinstance(result, Result)
        result.forward_s, result.both_s = (median(column) for column in zip(*taken_s, strict=True))
    return results


def _exact(inputs: dict[str, Any], grad: Tensor) -> list[Tensor]:
    """The result and all gradients in float64."""
    q, gate = (inputs[name].detach().double().requires_grad_() for name in ("q", "gate"))
    levels = [level.detach().double().requires_grad_() for level in inputs["levels"]]
    masks = None if inputs["mask"] is None else [inputs["mask"]]
    out = cross_layer_attention_reference(q, levels, gate, masks)
    return [out.detach(), *torch.autograd.grad(out, [q, gate, *levels], grad.double())]


def largest_error(actual: list[Tensor], exact: list[Tensor]) -> float:
    """Largest error of the results, each relative to its largest value."""
    errors = [((a.double() - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, exact, strict=True)]
    # No number is the largest error.
    return max(errors, key=lambda error: (error != error, error))


def _host_and_memory(both: Callable[[], list[Tensor]], device: torch.device) -> tuple[float | None, int | None]:
    if device.type != "cuda":
        return None, None
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        both()
        seconds.append(time.perf_counter() - begun)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = both()
    due = sum(tensor.numel() * tensor.element_size() for tensor in results)
    return median(seconds), torch.cuda.max_memory_allocated() - before - due


def _replayed(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The work as a CUDA graph's replay: what the device does, without the host."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(NUM_WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device).zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def roof(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a large matrix product, and bytes a second of a large copy, measured here."""
    side, count = (8192, 2**28) if device.type == "cuda" else (1536, 2**24)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = median(_timed(lambda: a @ b, device) for _ in range(7))
    copy = median(_timed(lambda: target.copy_(source), device) for _ in range(7))
    return 2 * side**3 / product, 2 * count / copy


def table(results: dict[Case, dict[str, Result | str]]) -> str:
    """A row a case and contestant, and how many times the best other's speed ours has."""
    lines = [
        "| case | | forward, ms | both, ms | TFLOP/s | GB/s | host, us | extra memory, MiB | error | ours is |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case, by_name in results.items():
        of_ours = by_name.get(OURS)
        for name, result in by_name.items():
            if isinstance(result, str):
                lines.append(f"| {case.label} | {name} | {result} |" + " |" * 7)
                continue
            cells = [f"{result.forward_s * 1e3:.3f}", f"{result.both_s * 1e3:.3f}"]
            cells += [f"{3.5 * case.flops / result.both_s / 1e12:.3f}", f"{case.num_bytes / result.both_s / 1e9:.1f}"]
            cells.append("" if result.host_s is None else f"{result.host_s * 1e6:.0f}")
            cells.append("" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.1f}")
            cells.append("" if result.error is None else f"{result.error:.1e}")
            compared = name != OURS and isinstance(of_ours, Result)
            cells.append(f"{result.both_s / of_ours.both_s:.2f} times as fast" if compared else "")  # type: ignore[union-attr]
            lines.append(f"| {case.label} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


METHOD = """\
S levels, T queries, V keys a level. separate: S calls of scaled_dot_product_attention and a gate-weighted sum, with
torch's choice of backend or the one named; stacked: one call with the levels as further batch entries;
stacked_compiled: torch.compile of that.

Forward, and forward with backward to all inputs, in medians of {rounds} rounds in which all take their turn. {device}
The gate is float32; where texts are read, half to all of their tokens are real. Operations are counted as 3.5 times the
two products forward, whatever a contestant computes again; bytes are those of inputs, result and gradients, each moved
once. A product of two large matrices reached {flops:.2f} TFLOP/s here, a copy {bandwidth:.1f} GB/s. Extra memory is the
most above inputs, result and gradients. The error is the largest of the result and of all gradients, relative to the
largest value in float64."""
ON_GPU = "A time is that of a CUDA graph's replay with an empty L2 cache; host is the CPU's time to issue both passes."


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
    parser.add_argument("--budget", type=float, help="begin no case after this many seconds (default: measure all)")
    parser.add_argument("--out", type=Path, help="file of the result; benchmarks/results/kernel_DEVICE.md by default")
    args = parser.parse_args(arguments)
    errors = []
    if args.rounds < 1:
        errors.append(f"--rounds {args.rounds}: at least 1 is needed")
    if args.budget is not None and args.budget <= 0:
        errors.append(f"--budget {args.budget}: more than 0 seconds are needed")
    if not args.cpu and not torch.cuda.is_available():
        errors.append("no GPU is found; use --cpu")
    if args.cpu:
        errors += [
            f"--contestants {name}: needs a GPU; leave it out"
            for name in args.contestants or ()
            if name not in CPU_CONTESTANTS
        ]
    known = {case.name for case in (cpu_cases() if args.cpu else gpu_cases())}
    errors += [
        f"--cases {name}: one of {', '.join(sorted(known))} is supported" for name in set(args.cases or ()) - known
    ]
    if errors:
        raise ConfigError(errors)
    return args


@exit_with_status
def main(arguments: list[str] | None = None) -> None:
    """Measure; print each case and write the result after it."""
    args = parse(arguments)
    begun = time.monotonic()
    device = torch.device("cpu" if args.cpu else "cuda")
    all_names = CPU_CONTESTANTS if args.cpu else GPU_CONTESTANTS
    names = tuple(name for name in all_names if name == OURS or not args.contestants or name in args.contestants)
    cases = [case for case in (cpu_cases() if args.cpu else gpu_cases()) if not args.cases or case.name in args.cases]
    kind = "cpu" if args.cpu else torch.cuda.get_device_name().lower().replace(" ", "_")
    out = args.out or ROOT / "benchmarks" / "results" / f"kernel_{kind}.md"
    flops, bandwidth = roof(device, cases[0].dtype)
    results: dict[Case, dict[str, Result | str]] = {}
    for number, case in enumerate(cases):
        if args.budget is not None and results and time.monotonic() - begun > args.budget:
            break
        results[case] = measure(case, names, args.rounds, device)
        rows = table({case: results[case]})
        print(rows if number == 0 else "\n".join(rows.splitlines()[2:]), flush=True)
        method = METHOD.format(
            rounds=args.rounds, flops=flops / 1e12, bandwidth=bandwidth / 1e9, device="" if args.cpu else ON_GPU
        )
        left = len(cases) - len(results)
        missing = f"\n\n{left} of {len(cases)} cases are not measured." if left else ""
        write_report(out, "Cross-layer attention by itself", f"{table(results)}\n\n{method}{missing}")
    print(f"\n{out}: {len(results)} of {len(cases)} cases")


if __name__ == "__main__":
    main()
