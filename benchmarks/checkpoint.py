"""Checkpoints: export, resuming at another number of ranks, and how long a save holds a step.

    export    pretrain.export against DeepSpeed's zero_to_torch, on files made in DeepSpeed's layout
    elastic   2 ranks' checkpoint taken up by 1: ours against ds_to_universal and load_universal
    held      seconds for which a training step waits for a save: background against plain, on 2 ranks

Source: `benchmarks/checkpoint_export.py` for the first; DeepSpeed 0.19, checkpoint/ds_to_universal.py.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoint_export import Measured, check_equal, compare, measure, table, write_checkpoint
from benchmarks.report import ROOT, write_report
from unimo3.errors import CommandParser, ConfigError, exit_with_status
from unimo3.launch import start_ranks, wait_for_ranks

WIDTH = 2048
TARGETS = "Targets: export at most 0.6 of the time and 600 MB; elastic at most 0.5 of the time; held at most 0.2."


def start_engine(num_parameters: int, universal: bool = False) -> Any:
    """An engine over square layers of about that many parameters, ZeRO-3 in bf16, AdamW."""
    import deepspeed
    import torch

    from unimo3 import distributed

    world = distributed.init()
    config = {
        "train_batch_size": world.size, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        "checkpoint": {"load_universal": universal},
    }  # fmt: skip
    with deepspeed.zero.Init(config_dict_or_path=config):
        layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(max(1, num_parameters // (WIDTH * WIDTH)))]
        model = torch.nn.Sequential(*layers)
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)[0]


def take_step(engine: Any) -> None:
    """One optimizer step, so that moments are not zero."""
    import torch

    loss = engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().square().mean()
    engine.backward(loss)
    engine.step()


def save_role(folder: Path, num_parameters: int, rounds: int) -> dict[str, Any]:
    """On 2 ranks: seconds each kind of save holds a step, by round; leaves a checkpoint of each step."""
    from unimo3.checkpoint.args import CheckpointArgs
    from unimo3.checkpoint.saving import Saver
    from unimo3.checkpoint.state import TrainState
    from unimo3.distributed import barrier, world

    engine = start_engine(num_parameters)
    take_step(engine)
    savers = {
        kind: Saver(engine, folder / kind, CheckpointArgs(background=kind == "background", keep_last=1))
        for kind in ("plain", "background")
    }
    held: dict[str, list[float]] = {kind: [] for kind in savers}
    whole: list[float] = []
    before = _memory("VmRSS")
    for number in range(rounds + 1):
        for kind, saver in savers.items():
            barrier()
            os.sync()
            start = time.perf_counter()
            saver.save(TrainState(number + 1, 0, "", "", world()[1], 2))
            held[kind].append(time.perf_counter() - start)
            saver.settle()
            if kind == "background":
                whole.append(time.perf_counter() - start)
    files = sum(path.stat().st_size for path in (folder / "plain").rglob("*.pt")) / world()[1]
    return {"held": held, "whole": whole, "more_bytes": _memory("VmRSS") - before, "files_bytes": files}


def load_role(folder: Path, num_parameters: int, universal: bool) -> dict[str, Any]:
    """On 1 rank: seconds and additional memory of a load into an engine that is up."""
    engine = start_engine(num_parameters, universal)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.perf_counter()
    if universal:
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    else:
        from unimo3.checkpoint.elastic import load_elastic

        load_elastic(engine, folder)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": _memory("VmHWM") - before, "digest": _digest(engine)}


def _digest(engine: Any) -> list[float]:
    """What two loads must agree on."""
    flats = engine.optimizer.fp32_partitioned_groups_flat
    states = engine.optimizer.optimizer.state
    moments = [states[flat][key].double().sum().item() for flat in flats for key in ("exp_avg", "exp_avg_sq")]
    return [sum(flat.double().sum().item() for flat in flats), *moments]


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{name}:"))


def in_ranks(num_ranks: int, *arguments: object) -> dict[str, Any]:
    """Start this program once a rank in a role; what rank 0 tells.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        told, output = Path(scratch) / "told.json", Path(scratch) / "output.txt"
        command = [sys.executable, __file__, "--role", *map(str, arguments), str(told)]
        with output.open("w") as file:
            ranks = start_ranks(num_ranks, command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            if wait_for_ranks(ranks, grace_s=5):
                raise RuntimeError(f"{' '.join(command)} failed:\n{output.read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(told.read_text())
        return found


def play(arguments: list[str]) -> None:
    """Be one rank of a role: name, folder, parameters, rounds, file for what is told."""
    role, folder, num_parameters, rounds, told = arguments
    if role == "save":
        found = save_role(Path(folder), int(num_parameters), int(rounds))
    else:
        found = load_role(Path(folder), int(num_parameters), universal=role == "universal")
    if os.environ["RANK"] == "0":
        Path(told).write_text(json.dumps(found))


def measure_engine(num_parameters: int, rounds: int, work: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The saves of 2 ranks, then their checkpoint loaded by 1: ours, and converted by DeepSpeed first."""
    saves = in_ranks(2, "save", work, num_parameters, rounds)
    checkpoint = next((work / "plain" / "checkpoints").glob("step_*"))
    loads: dict[str, list[Any]] = {"ours": [], "ds_to_universal": []}
    for number in range(rounds):
        ours = in_ranks(1, "elastic", checkpoint, num_parameters, rounds)
        universal = work / f"universal_{number}"
        flags = ["--input_folder", str(checkpoint), "--output_folder", str(universal), "--inject_missing_state"]
        converted = measure([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *flags], work / "output.txt")
        loaded = in_ranks(1, "universal", universal, num_parameters, rounds)
        shutil.rmtree(universal)
        if ours["digest"] != loaded["digest"]:
            raise RuntimeError(f"the loads differ: {ours['digest']}, {loaded['digest']}")
        loads["ours"].append((ours["seconds"], 0.0, ours["bytes"]))
        loads["ds_to_universal"].append(
            (loaded["seconds"], converted.seconds, max(loaded["bytes"], converted.peak_bytes))
        )
    return saves, loads


def report(
    exports: dict[int, dict[str, Measured]], num_parameters: int, saves: dict[str, Any], loads: dict[str, list[Any]]
) -> str:
    """The result in markdown."""
    plain, background = (median(saves["held"][kind][1:]) for kind in ("plain", "background"))
    earliest = saves["held"]["background"][0]
    rows = {
        name: (median(load for load, _, _ in runs), median(conversion for _, conversion, _ in runs),
               max(peak for _, _, peak in runs))
        for name, runs in loads.items()
    }  # fmt: skip
    total = {name: load + conversion for name, (load, conversion, _) in rows.items()}
    lines = [
        "## Export", "", table(exports), "",
        "Half precision, files in the page cache; peaks are of the whole process tree, imports included.", "",
        "## Another number of ranks", "",
        f"{num_parameters / 1e9:.2f}B parameters, 2 ranks' checkpoint taken up by 1, engine already up.", "",
        "| | load, s | conversion before it, s | of ds_to_universal's | more memory, MB |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {name} | {load:.2f} | {first:.2f} | {total[name] / total['ds_to_universal']:.2f} | {peak / 1e6:.0f} |"
            for name, (load, first, peak) in rows.items()
        ),
        "", "Both end with the same sums of weights and moments. Memory is the load's peak beyond the engine's own, or",
        f"the conversion's whole peak if that is larger. {8 * num_parameters / 1e6:.0f} MB of it are the moments:",
        "before its first step the engine has none.", "",
        "## How long a save holds a step", "",
        f"{num_parameters / 1e9:.2f}B parameters on 2 ranks, {saves['files_bytes'] / 1e6:.0f} MB of files a rank.", "",
        "| | step held, s | of the plain save's |", "| --- | ---: | ---: |",
        f"| plain | {plain:.2f} | 1 |",
        f"| background, the first of a run | {earliest:.2f} | {earliest / plain:.2f} |",
        f"| background, later | {background:.2f} | {background / plain:.2f} |", "",
        f"A background save is committed {median(saves['whole'][1:]):.2f} s after it began. All saves together",
        f"left rank 0 with {saves['more_bytes'] / 1e6:.0f} MB more, most of it the kept copy.", "",
        TARGETS,
    ]  # fmt: skip
    return "\n".join(lines)


@exit_with_status
def main(arguments: list[str] | None = None) -> None:
    """Measure, write the result and print it."""
    parser = CommandParser(prog="python benchmarks/checkpoint.py", description=__doc__)
    parser.add_argument("--export", type=float, nargs="+", default=[0.3e9, 1e9], help="parameters (default: 0.3e9 1e9)")
    parser.add_argument("--engine", type=float, default=0.3e9, help="parameters trained (default: 0.3e9)")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for some 40 GB of files (default: the system's)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "checkpoint.md")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.role:
        play(args.role)
        return
    if args.rounds < 1 or args.engine < WIDTH * WIDTH or min(args.export) < 1e6:
        raise ConfigError("--rounds, --engine, --export: at least 1, one layer of 4.2e6 and 1e6 are needed")
    exports = {}
    for count in args.export:
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            folder = Path(work) / "checkpoint"
            made = write_checkpoint(folder, int(count), moments=False)
            check_equal(folder, Path(work))
            exports[made] = compare(folder, Path(work), args.rounds)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        saves, loads = measure_engine(int(args.engine), args.rounds, Path(work))
    text = report(exports, int(args.engine), saves, loads)
    write_report(args.out, "Checkpoints", text)
    print(f"\n{text}\n\n{args.out}")


if __name__ == "__main__":
    main()
