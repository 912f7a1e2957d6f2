"""A checkpoint of hundreds of ranks: what one rank does to open it elastically, to commit it and to verify it.

Source: DeepSpeed 0.19 for the layout of the files, which are holes of the right sizes.
"""

import math
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoint_export import TAG, shapes_of, write_checkpoint
from benchmarks.simulated_ranks import on_simulated_ranks, opened_paths
from unimo3.checkpoint import save, store
from unimo3.checkpoint.manifest import STATE, flush_and_hash, verify
from unimo3.checkpoint.state import TrainState
from unimo3.checkpoint.torch_file import close_files
from unimo3.checkpoint.zero_reader import WEIGHTS, ZeroCheckpoint

TARGET = "opening and planning at most 2 s and 8 opens a rank"


@dataclass(frozen=True)
class Planned:
    """What one rank does of an elastic load, up to the values it reads.

    Attributes:
        opens: files and folders of the checkpoint, before its own values.
        received_bytes: of collectives.
        read_files: ranks' files that its own values come from, weights and moments.
        read_s: to read these values, which are holes.
    """

    rank: int
    plan_s: float
    opens: int
    received_bytes: int
    read_files: int
    read_s: float


def measure_elastic_plan(num_parameters: int, before: int, after: int, work: Path) -> list[Planned]:
    """Open a ZeRO-3 checkpoint of `before` ranks at `after` ranks: the first ranks, one in the middle and the last."""
    write_checkpoint(work / "made", shapes_of(num_parameters), num_ranks=before, weights=False)
    folder = work / "made" / TAG
    measured = sorted({0, 1, after // 2, after - 1})
    costs = on_simulated_ranks(after, lambda: ZeroCheckpoint(folder, over_ranks=True), measured)
    planned = []
    for rank in measured:
        cost, source = costs[rank], costs[rank].result
        started = time.perf_counter()
        with opened_paths() as opened:
            for name, shape in source.trained.items():
                part = math.ceil(shape.numel() / after)
                first = min(shape.numel(), part * rank)
                for kind in (WEIGHTS, *source.moments):
                    source.fragment(name, first, min(part, shape.numel() - first), kind)
        read_s, opens = time.perf_counter() - started, _num_in(folder, cost.opened)
        planned.append(Planned(rank, cost.seconds, opens, cost.received_bytes, _num_in(folder, set(opened)), read_s))
        close_files()
    return planned


def elastic_plan_table(before: int, after: int, ranks: list[Planned]) -> str:
    """In markdown, a row a rank."""
    lines = [
        "| rank | opening and planning, s | opens | received, MB | own values: files | own values, s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {rank.rank} | {rank.plan_s:.2f} | {rank.opens} | {rank.received_bytes / 1e6:.2f} | "
            f"{rank.read_files} | {rank.read_s:.2f} |"
            for rank in ranks
        ),
        "",
        f"A ZeRO-3 checkpoint of {before} ranks is opened by {after}, which run by turns in one process. The seconds",
        "are those of the rank without the others, the files in the page cache. Opens are files and folders of the",
        "checkpoint before the rank reads its own values; its own values come from the files of that many ranks. What",
        f"is received comes from collectives. Verification, which comes before, is below. Target: {TARGET}.",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Done:
    """One action of one rank.

    Attributes:
        opens: files and folders of the checkpoint, as often as they are opened.
    """

    seconds: float
    opens: int


def measure_commit(num_files: int, work: Path) -> dict[str, Done]:
    """Commit a checkpoint of two files a rank, and verify it over as many ranks.

    Args:
        num_files: of the manifest, even and at least 6.

    Raises:
        RuntimeError: the committed checkpoint is not good.
    """
    num_ranks = num_files // 2 - 1
    write_checkpoint(work / "made", shapes_of(10**6), num_ranks=num_ranks, weights=False)
    staging, final = (store.folder_of(work) / f"{store.tag_of(4)}{end}" for end in (".tmp", ""))
    staging.parent.mkdir()
    (work / "made" / TAG).rename(staging)
    TrainState(4, 32, "", "", num_ranks, 8).write(staging / STATE)
    (staging / "rng_rank_0.safetensors").write_bytes(b"")
    files = sorted(staging.iterdir())
    of_rank_1 = [path for path in files if "_rank_1_" in path.name]
    done: dict[str, Done] = {}
    problems: list[str] = []
    with _measured(done, "a rank: flush and hash its two files", staging):
        entries = flush_and_hash(staging, of_rank_1)
    parts = [entries, flush_and_hash(staging, [path for path in files if path not in of_rank_1])]
    with _measured(done, "rank 0: manifest, rename, `latest`", staging.parent):
        save._commit(staging, final, parts)
    for rank in (0, 1):
        with _measured(done, f"rank {rank}: verify its part", final):
            problems += verify(final, rank, num_ranks)
    with _measured(done, "one process: verify all files", final):
        problems += verify(final)
    if problems:
        raise RuntimeError("; ".join(problems))
    return done


def commit_table(num_files: int, done: dict[str, Done]) -> str:
    """In markdown, a row an action."""
    return "\n".join(
        [
            "| action | s | opens |",
            "| --- | ---: | ---: |",
            *(f"| {name} | {one.seconds:.3f} | {one.opens} |" for name, one in done.items()),
            "",
            f"A checkpoint of {num_files} small files, two a rank, on a local disk. A rank verifies its part: the",
            "manifest, the hash of its files and the restricted look into them. Rank 0 also lists the folder.",
        ]
    )


@contextmanager
def _measured(done: dict[str, Done], name: str, folder: Path) -> Iterator[None]:
    started = time.perf_counter()
    with opened_paths() as opened:
        yield
    done[name] = Done(time.perf_counter() - started, _num_in(folder, opened))


def _num_in(folder: Path, paths: Collection[str]) -> int:
    return sum(path.startswith(str(folder)) for path in paths)
