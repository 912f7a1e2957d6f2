"""A training step's speed and peak memory: UNIMO-3 against transformers' BridgeTower, and its two interactions.

Source: `benchmarks/contestants.py` for the models, `benchmarks/timing.py` for how.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import unimo3  # noqa: F401  (before transformers: it makes torchvision importable)
from benchmarks.contestants import (
    BRIDGETOWER,
    CONTESTANTS,
    CROSS_LAYER,
    IMPLEMENTATIONS,
    IN_LAYER,
    BridgeTowerForPreTraining,
    Size,
    build,
    draw_batch,
)
from benchmarks.report import ROOT, write_report
from benchmarks.timing import PHASES, Trainee, peak_bytes, time_in_turns
from unimo3.errors import CommandParser, ConfigError, exit_with_status

SIZES = {
    "tiny": Size(width=64, tower_layers=2, fusion_layers=2, image_size=32, num_tokens=8, vocab_size=512),
    "cpu": Size(width=256, tower_layers=6, fusion_layers=6, image_size=96, num_tokens=32, vocab_size=50265),
    "base": Size(width=768, tower_layers=12, fusion_layers=6, image_size=288, num_tokens=50, vocab_size=50265),
}
BATCHES = {"tiny": 4, "cpu": 32, "base": 64}
ROUNDS = {"tiny": 3, "cpu": 12, "base": 30}
ROUNDS_OF_CHOICE = 3
STEPS_OF_MEMORY = 3
TARGETS = ((IN_LAYER, BRIDGETOWER, 1.4), (CROSS_LAYER, IN_LAYER, 0.95))

METHOD = """\
One step is MLM and ITM on the same pairs: forward, backward, AdamW. {precision}. Dropout 0.1, batches of {batch} pairs,
{width} wide, {towers} text, {towers} image and {fusion} fusion layers, {pixels} pixels, {tokens} text tokens, {vocab}
words, random weights and data. Times are medians of {rounds} rounds in which all take a step in turn; a ratio is the
median over rounds, its range in brackets. Memory is the peak of a separate process in {memory_steps} steps{less}.

`bridgetower` is transformers' model under its MLM and ITM heads, trained as METER: a pass for each objective, MLM
scores for every token, decoder tied to the word embedding. Its attention is {attention}, {choice}.
`in_layer` and `cross_layer` (gate `token`) are this project's{compiled}."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line and fill in what the size decides.

    Raises:
        ConfigError: something cannot be used; all errors in one message.
    """
    parser = CommandParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu", help="cpu, tiny (for tests), or base on a GPU")
    parser.add_argument("--rounds", type=int, help="rounds of one step each; more narrow the spread")
    parser.add_argument("--batch", type=int, help="pairs a step")
    parser.add_argument("--attention", choices=IMPLEMENTATIONS, help="BridgeTower's (default: the faster one)")
    parser.add_argument("--compile-towers", action="store_true", help="torch.compile the towers of ours")
    parser.add_argument("--only", choices=CONTESTANTS, help="print this one's peak memory as JSON, nothing else")
    parser.add_argument("--out", type=Path, help="file of the result; benchmarks/results/step_SIZE.md by default")
    args = parser.parse_args(arguments)
    args.rounds = ROUNDS[args.size] if args.rounds is None else args.rounds
    args.batch = BATCHES[args.size] if args.batch is None else args.batch
    args.out = args.out or ROOT / "benchmarks" / "results" / f"step_{args.size}.md"
    args.device = torch.device("cuda" if args.size == "base" else "cpu")
    errors = []
    if args.rounds < 1:
        errors.append(f"--rounds {args.rounds}: at least 1 is needed")
    if args.batch < 2:
        errors.append(f"--batch {args.batch}: at least 2 are needed, since ITM swaps images")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        errors.append("--size base: needs a GPU and none is found; use --size cpu")
    if args.compile_towers and args.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        errors.append("--compile-towers: needs a C++ compiler and none is found; install g++ or leave it out")
    if errors:
        raise ConfigError(errors)
    return args


def trainee(name: str, args: argparse.Namespace) -> Trainee:
    """A contestant, ready to step."""
    module = build(name, SIZES[args.size], args.compile_towers)
    if isinstance(module, BridgeTowerForPreTraining) and args.attention:
        module.set_attention(args.attention)
    return Trainee(module, args.device)


def batch_of(number: int, args: argparse.Namespace) -> dict[str, Tensor]:
    """The pairs of one round."""
    return draw_batch(SIZES[args.size], args.batch, seed=number)


def memory(args: argparse.Namespace) -> int:
    """Bytes that `args.only` adds to this process's peak, over what the libraries took."""
    before = peak_bytes(args.device)
    contestant = trainee(args.only, args)
    for number in range(STEPS_OF_MEMORY):
        contestant.step(batch_of(number, args))
    return peak_bytes(args.device) - before


def memory_of_each(args: argparse.Namespace) -> dict[str, int]:
    """Bytes of every contestant, each in a separate process."""
    options = ["--size", args.size, "--batch", str(args.batch), "--attention", args.attention]
    options += ["--compile-towers"] if args.compile_towers else []
    peaks = {}
    for name in tqdm(CONTESTANTS, desc="peak memory", unit="model"):
        command = [sys.executable, "-m", "benchmarks.step", "--only", name, *options]
        answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
        peaks[name] = json.loads(answer.splitlines()[-1])["peak_bytes"]
    return peaks


def faster_attention(bridgetower: Trainee, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of BridgeTower's step with each implementation of attention, the faster first."""

    def ready(implementation: str) -> Trainee:
        bridgetower.module.set_attention(implementation)
        return bridgetower

    turns = {name: lambda name=name: ready(name) for name in IMPLEMENTATIONS}
    steps = time_in_turns(turns, lambda number: batch_of(number, args), ROUNDS_OF_CHOICE, "BridgeTower's attention")
    medians = {name: median(map(sum, rounds)) for name, rounds in steps.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time all contestants, then take their memory; sets `args.attention` if it is None."""
    trainees = {name: trainee(name, args) for name in CONTESTANTS}
    choice = {} if args.attention else faster_attention(trainees[BRIDGETOWER], args)
    args.attention = args.attention or next(iter(choice))
    trainees[BRIDGETOWER].module.set_attention(args.attention)
    turns = {name: lambda name=name: trainees[name] for name in CONTESTANTS}
    seconds = time_in_turns(turns, lambda number: batch_of(number, args), args.rounds, "steps")
    parameters = {name: sum(p.numel() for p in one.module.parameters()) for name, one in trainees.items()}
    losses = {name: (one.losses[0], one.losses[-1]) for name, one in trainees.items()}
    trainees.clear()
    return {
        "choice": choice,
        "seconds": seconds,
        "parameters": parameters,
        "losses": losses,
        "peak_bytes": memory_of_each(args),
    }


def ratios(faster: list[tuple[float, ...]], slower: list[tuple[float, ...]]) -> tuple[float, float, float]:
    """How many times the speed of `slower` a model has: median, least and most over rounds."""
    each = [sum(other) / sum(one) for one, other in zip(faster, slower, strict=True)]
    return median(each), min(each), max(each)


def tables(measured: dict[str, Any], num_pairs: int) -> str:
    """The metrics as two markdown tables."""
    phase_names = " | ".join(PHASES)
    lines = [
        f"| model | parameters | pairs/s | ms a step | {phase_names} | peak memory, MiB | loss, first to last |",
        "| --- |" + " ---: |" * (len(PHASES) + 5),
    ]
    for name, steps in measured["seconds"].items():
        total = median(map(sum, steps))
        phases = [f"{median(step[i] / sum(step) for step in steps):.0%}" for i in range(len(PHASES))]
        first, last = measured["losses"][name]
        cells = [name, f"{measured['parameters'][name]:,}", f"{num_pairs / total:.1f}", f"{total * 1e3:.0f}", *phases]
        cells += [f"{measured['peak_bytes'][name] / 2**20:.0f}", f"{first:.2f} to {last:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| speed of | over | target | measured | |", "| --- | --- | ---: | ---: | --- |"]
    for faster, slower, target in TARGETS:
        middle, least, most = ratios(measured["seconds"][faster], measured["seconds"][slower])
        verdict = "reached" if middle >= target else "not reached"
        lines.append(f"| {faster} | {slower} | {target} | {middle:.2f} ({least:.2f} to {most:.2f}) | {verdict} |")
    return "\n".join(lines)


def method(measured: dict[str, Any], args: argparse.Namespace) -> str:
    """What was measured, in words."""
    size, on_gpu = SIZES[args.size], args.device.type == "cuda"
    timed = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in measured["choice"].items())
    return METHOD.format(
        precision="bfloat16 by autocast, weights in float32" if on_gpu else "float32",
        batch=args.batch,
        width=size.width,
        towers=size.tower_layers,
        fusion=size.fusion_layers,
        pixels=size.image_size,
        tokens=size.num_tokens,
        vocab=size.vocab_size,
        rounds=args.rounds,
        memory_steps=STEPS_OF_MEMORY,
        less="" if on_gpu else ", less what the libraries take",
        attention=args.attention,
        choice=f"the faster ({timed} a step)" if timed else "as in the command",
        compiled=", towers compiled" if args.compile_towers else "",
    )


@exit_with_status
def main(arguments: list[str] | None = None) -> None:
    """Measure, write the result and print it."""
    args = parse(arguments)
    if args.only:
        print(json.dumps({"peak_bytes": memory(args)}))
        return
    measured = measure(args)
    metrics = tables(measured, args.batch)
    write_report(args.out, f"A training step, size {args.size}", f"{metrics}\n\n{method(measured, args)}")
    print(f"\n{metrics}\n\n{args.out}")


if __name__ == "__main__":
    main()
