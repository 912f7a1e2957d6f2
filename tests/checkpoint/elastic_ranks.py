"""What ranks do in the tests of runs that change their number of ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.checkpoint.ranks import draw, every_value, start_engine, state_at
from unimo3.checkpoint import zero_reader
from unimo3.checkpoint.load import load, newest_good
from unimo3.checkpoint.save import save
from unimo3.distributed import world
from unimo3.errors import CheckpointError

# Runs that change their number of ranks: stage and precision.
ELASTIC_RUNS = {"zero3": (3, True), "zero3 fp32": (3, False), "zero2": (2, True)}
ELASTIC_ROWS = 12  # of a step over all ranks; divides by 1, 2, 3 and 4


def elastic_leg(root: Path, step: int) -> dict[str, Any]:
    """Resume each of `ELASTIC_RUNS` at `step` (0: begin it), train two steps and save; from the beginning, train
    on to step 10 as well.

    Returns:
        For each run, every value right after loading and right before saving, and the losses of all steps.
    """
    results: dict[str, Any] = {}
    for name, (stage, bf16) in ELASTIC_RUNS.items():
        engine = start_engine(stage, bf16, seed=step, rows=ELASTIC_ROWS // world()[1])  # other weights each time
        engine.module.model.dropout.p = 0.0
        result: dict[str, Any] = {}
        if step:
            newest = newest_good(root / name)
            assert newest is not None
            if step == 2 and stage == 2:
                other = start_engine(stage, bf16, rows=ELASTIC_ROWS // world()[1], round_robin_gradients=True)
                try:
                    load(other, newest)
                except CheckpointError as error:
                    result["round robin"] = str(error)
            with counted_fragments() as num_read:
                result["state"] = load(engine, newest)
            result["num_read"] = num_read
            result["loaded"], result["drawn at first"] = every_value(engine), draw()
        else:
            # Nothing is as it would be anyway.
            for number, group in enumerate(engine.optimizer.optimizer.param_groups):
                group["weight_decay"] += 0.01 * (number + 1)
                group["lr"] *= 0.5
        result["losses"] = train_together(engine, range(step, step + 2))
        result["saved"] = every_value(engine)
        save(engine, root / name, state_at(step + 2))
        result["drawn"] = draw()
        if step == 0:
            result["losses"] += train_together(engine, range(2, 10))
        results[name] = result
    return results


@contextmanager
def counted_fragments() -> Iterator[dict[str, int]]:
    """Counts the elements that this rank reads of each parameter, moments included."""
    stock, counts = zero_reader.ZeroCheckpoint.fragment, dict[str, int]()

    def counted(source: Any, name: str, first: int, count: int, kind: str = zero_reader.WEIGHTS) -> torch.Tensor:
        counts[name] = counts.get(name, 0) + count
        return stock(source, name, first, count, kind)

    zero_reader.ZeroCheckpoint.fragment = counted
    try:
        yield counts
    finally:
        zero_reader.ZeroCheckpoint.fragment = stock


def train_together(engine: Any, steps: range) -> list[float]:
    """Mean losses over all ranks; a step's rows are the same at any number of ranks."""
    rank, size = world()
    losses = []
    for step in steps:
        ids = torch.randint(11, (ELASTIC_ROWS,), generator=torch.Generator().manual_seed(step))
        loss = engine(ids[rank * ELASTIC_ROWS // size : (rank + 1) * ELASTIC_ROWS // size])
        engine.backward(loss)
        engine.step()
        total = loss.detach().float().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / size)
    return losses


def load_universal(folder: Path) -> dict[str, Any]:
    """Every value after DeepSpeed has loaded what its ds_to_universal made."""
    engine = start_engine(3, bf16=True, seed=9, rows=ELASTIC_ROWS // world()[1], universal=True)
    engine.load_checkpoint(str(folder.parent), tag=folder.name)
    return every_value(engine)


def structure_read_together(folder: Path) -> tuple[int, dict[str, Any]]:
    """The number of files whose structure this rank reads, and every element of the weights and moments."""
    opened = []
    read = zero_reader.load_structure

    def counted(path: Path) -> dict[str, Any]:
        opened.append(path.name)
        return read(path)

    zero_reader.load_structure = counted
    source = zero_reader.ZeroCheckpoint(folder, over_ranks=True)
    count = len(opened)
    values = {
        f"{kind} {name}": source.fragment(name, 0, source.shape(name).numel(), kind)
        for name in source.trained
        for kind in (zero_reader.WEIGHTS, *source.moments)
    }
    return count, values | {name: source.tensor(name) for name in source.names()}
