"""Seconds for which a training step waits for a save, in the background and plain, on 2 ranks.

    python -m benchmarks.checkpoint_blocked FOLDER PARAMETERS ROUNDS RESULT    (one rank of it)

Source: none.
"""

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpoint_engine import WIDTH, in_ranks, memory_bytes, start_engine

NUM_RANKS = 2


def measure_blocked(num_parameters: int, rounds: int, work: Path) -> dict[str, Any]:
    """Seconds each kind of save blocks a step, by round, including the first of a run."""
    return in_ranks(NUM_RANKS, "benchmarks.checkpoint_blocked", work, num_parameters, rounds)


def blocked_table(num_parameters: int, saves: dict[str, Any]) -> str:
    """The result in markdown."""
    plain, background = (median(saves["blocked"][kind][1:]) for kind in ("plain", "background"))
    earliest = saves["blocked"]["background"][0]
    lines = [
        f"{num_parameters / 1e9:.2f}B parameters on 2 ranks, {saves['files_bytes'] / 1e6:.0f} MB of files a rank.",
        "",
        "| | step blocked, s | of the plain save's |",
        "| --- | ---: | ---: |",
        f"| plain | {plain:.2f} | 1 |",
        f"| background, the first of a run | {earliest:.2f} | {earliest / plain:.2f} |",
        f"| background, later | {background:.2f} | {background / plain:.2f} |",
        "",
        f"A background save is committed {median(saves['total'][1:]):.2f} s after it began. Its copy takes",
        f"{saves['copies_bytes'] / 1e6:.0f} MB of a rank's memory; all saves together left rank 0 with"
        f" {saves['more_bytes'] / 1e6:.0f} MB more.",
    ]
    return "\n".join(lines)


def save_by_turns(folder: Path, num_parameters: int, rounds: int) -> dict[str, Any]:
    """Be one rank: save by turns in both ways, once more than `rounds`."""
    import torch

    from unimo3.checkpoint.args import CheckpointArgs
    from unimo3.checkpoint.save import Saver
    from unimo3.checkpoint.state import TrainState
    from unimo3.distributed import barrier, world

    engine = start_engine(num_parameters)
    # One optimizer step, so that there are moments.
    engine.backward(engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().square().mean())
    engine.step()
    savers = {
        kind: Saver(engine, folder / kind, CheckpointArgs(background=kind == "background", keep_last=1))
        for kind in ("plain", "background")
    }
    blocked: dict[str, list[float]] = {kind: [] for kind in savers}
    total: list[float] = []
    before = memory_bytes("VmRSS")
    for number in range(rounds + 1):
        for kind, saver in savers.items():
            barrier()
            os.sync()
            start = time.perf_counter()
            saver.save(TrainState(number + 1, 0, "", "", world()[1], 2))
            blocked[kind].append(time.perf_counter() - start)
            saver.wait()
            if kind == "background":
                total.append(time.perf_counter() - start)
    files = sum(path.stat().st_size for path in (folder / "plain").rglob("*.pt")) / world()[1]
    more, buffer_bytes = memory_bytes("VmRSS") - before, savers["background"].memory_bytes
    return {"blocked": blocked, "total": total, "more_bytes": more, "copies_bytes": buffer_bytes, "files_bytes": files}


if __name__ == "__main__":
    result = save_by_turns(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[4]).write_text(json.dumps(result))
