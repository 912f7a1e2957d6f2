"""A checkpoint of 2 ranks resumed by 1: ours against DeepSpeed's ds_to_universal and load_universal.

    python -m benchmarks.checkpoint_elastic ours|universal FOLDER PARAMETERS RESULT    (the rank that loads)

The checkpoint is made here in DeepSpeed's layout: training one of 1B parameters on 2 ranks would not fit the machine.
Both loads start with an engine that is up; ours first verifies every file, as a run does.

Source: DeepSpeed 0.19, checkpoint/ds_to_universal.py.
"""

import json
import shutil
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpoint_engine import WIDTH, in_ranks, memory_bytes, num_layers, start_engine
from benchmarks.checkpoint_export import TAG, measure, write_checkpoint

OURS, UNIVERSAL = "ours", "universal"
# Bytes a parameter that DeepSpeed's load took at 0.3B parameters, engine included.
_UNIVERSAL_BYTES = 27


@dataclass(frozen=True)
class Loaded:
    """One way to resume from a checkpoint, in seconds.

    Attributes:
        before_s: what has to be done before the load: verification, or conversion.
        load_s: None if the load was not run for want of memory.
        peak_bytes: the load's peak beyond the engine's memory, or the conversion's full peak if that is larger.
    """

    before_s: float
    load_s: float | None
    peak_bytes: int


def measure_elastic(num_parameters: int, rounds: int, work: Path) -> dict[str, Loaded]:
    """Medians of both ways; the loads must agree on the sums of weights and moments.

    Raises:
        RuntimeError: they do not.
    """
    checkpoint = make_checkpoint(work, num_parameters)
    ours: list[Loaded] = []
    universal: list[Loaded] = []
    fits = _UNIVERSAL_BYTES * num_parameters < available_bytes()
    for _ in range(rounds):
        mine = in_ranks(1, "benchmarks.checkpoint_elastic", OURS, checkpoint, num_parameters)
        ours.append(Loaded(mine["before_s"], mine["load_s"], mine["peak_bytes"]))
        converted_to = work / "universal"
        flags = ["--input_folder", str(checkpoint), "--output_folder", str(converted_to), "--inject_missing_state"]
        converted = measure([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *flags], work / "output.txt")
        if fits:
            theirs = in_ranks(1, "benchmarks.checkpoint_elastic", UNIVERSAL, converted_to, num_parameters)
            if mine["digest"] != theirs["digest"]:
                raise RuntimeError(f"the loads differ: {mine['digest']}, {theirs['digest']}")
            peak = max(theirs["peak_bytes"], converted.peak_bytes)
            universal.append(Loaded(converted.seconds, theirs["load_s"], peak))
        else:
            universal.append(Loaded(converted.seconds, None, converted.peak_bytes))
        shutil.rmtree(converted_to)
    return {"ours": _median(ours), "ds_to_universal": _median(universal)}


def elastic_table(results: dict[int, dict[str, Loaded]]) -> str:
    """The results in markdown, by number of parameters."""
    lines = [
        "| parameters | | before the load, s | load, s | of ds_to_universal's | more memory, MB |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for count, ways in results.items():
        total = {name: way.before_s + (way.load_s or 0.0) for name, way in ways.items()}
        for name, way in ways.items():
            load = "does not fit" if way.load_s is None else f"{way.load_s:.2f}"
            ratio = total[name] / total["ds_to_universal"]
            lines.append(
                f"| {count / 1e9:.2f}B | {name} | {way.before_s:.2f} | {load} | {ratio:.2f} | "
                f"{way.peak_bytes / 1e6:.0f} |"
            )
    lines += [
        "",
        "Before the load ours verifies all files, DeepSpeed's program converts them. A load that does not fit this",
        "machine counts as no time at all. Where both ran they ended with the same sums of weights and moments. Memory",
        "is the load's peak beyond the engine's, or the conversion's full peak if that is larger. Of each load's,",
        "8 bytes a parameter are the engine's moments, which it does not have before its first step.",
    ]
    return "\n".join(lines)


def make_checkpoint(work: Path, num_parameters: int) -> Path:
    """A checkpoint of 2 ranks for the engine of that size, with moments, state and manifest."""
    import torch

    from unimo3.checkpoint.manifest import STATE, flush_and_hash, write_manifest
    from unimo3.checkpoint.state import TrainState

    shapes: dict[str, Any] = OrderedDict()
    for layer in range(num_layers(num_parameters)):
        shapes |= {f"{layer}.weight": torch.Size([WIDTH, WIDTH]), f"{layer}.bias": torch.Size([WIDTH])}
    write_checkpoint(work / "made", [shapes])
    checkpoint = work / "made" / TAG
    TrainState(4, 32, "", "", 2, 8).write(checkpoint / STATE)
    write_manifest(checkpoint, flush_and_hash(checkpoint, sorted(checkpoint.iterdir())))
    return checkpoint


def load_role(kind: str, folder: Path, num_parameters: int) -> dict[str, Any]:
    """Be the rank that loads."""
    from unimo3.checkpoint.elastic import load_elastic
    from unimo3.checkpoint.manifest import verify
    from unimo3.checkpoint.zero_reader import ZeroCheckpoint

    engine = start_engine(num_parameters, universal=kind == UNIVERSAL)
    start = time.perf_counter()
    if kind == OURS and (problems := verify(folder)):
        raise RuntimeError("; ".join(problems))
    verified = time.perf_counter()
    before = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    if kind == UNIVERSAL:
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    else:
        load_elastic(engine, ZeroCheckpoint(folder, over_ranks=True))
    ended = time.perf_counter()
    peak = memory_bytes("VmHWM") - before
    return {"before_s": verified - start, "load_s": ended - verified, "peak_bytes": peak, "digest": _digest(engine)}


def available_bytes() -> int:
    """Memory that programs can get now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _digest(engine: Any) -> list[float]:
    """What two loads must agree on."""
    flats = engine.optimizer.fp32_partitioned_groups_flat
    states = engine.optimizer.optimizer.state
    parts = [*flats, *(states[flat][key] for flat in flats for key in ("exp_avg", "exp_avg_sq"))]
    # Piece by piece: a full partition in float64 would need twice its memory.
    return [sum(piece.double().sum().item() for piece in part.detach().split(2**24)) for part in parts]


def _median(runs: list[Loaded]) -> Loaded:
    loads = [run.load_s for run in runs if run.load_s is not None]
    return Loaded(
        median(run.before_s for run in runs), median(loads) if loads else None, max(run.peak_bytes for run in runs)
    )


if __name__ == "__main__":
    result = load_role(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    Path(sys.argv[4]).write_text(json.dumps(result))
