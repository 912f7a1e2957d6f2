"""What a run reads, step by step, through a kill and other numbers of ranks and readers: always the same."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from tests.data.conftest import convert, index_again, write_source
from tests.spawn import start_process
from tests.waiting import text_of, wait_for, wait_for_end
from unimo3.data.args import DataArgs
from unimo3.data.index import ShardIndex
from unimo3.data.samples import PretrainSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform

GLOBAL_BATCH, STEPS = 12, 9


def digest(tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def read(data, tokenizer, rank, world_size, micro_batch, start, stop, path: Path):
    """One rank: write each step's samples, their masks and augmented pixels, as soon as they are read."""
    tokenizer = load_tokenizer(tokenizer)
    sources = [
        PretrainSamples(index, tokenizer, 16, ImageTransform(32, "randaugment", crop_scale=0.5), 0.15, seed=3)
        for index in data.open_train()
    ]
    loader = data.training_loader(sources, GLOBAL_BATCH, micro_batch, rank, world_size, seed=3, start_step=start)
    with path.open("w", buffering=1) as file:
        for step, micro_batches in zip(range(start, stop), loader, strict=False):
            for micro_step, batch in enumerate(micro_batches):
                rows = [
                    [*sample, digest(batch["mlm_input_ids"][row]), digest(batch["images"][row])]
                    for row, sample in enumerate(batch["samples"])
                ]
                file.write(json.dumps({"step": step, "position": [micro_step, rank], "rows": rows}) + "\n")
            time.sleep(0.01)  # a step takes a while, so that a kill comes between two
    os._exit(0)  # as a rank ends: without waiting for its readers


class Run:
    """A run that is stopped and resumed; its ledger lists what was read at each step.

    Args:
        function: of one rank, with the arguments of `read`.
        settings: others of `DataArgs`.
    """

    def __init__(self, folder: Path, train, tokenizer: Path, function=read, **settings):
        self._folder, self._train, self._tokenizer = folder, train, str(tokenizer)
        self._function, self.settings = function, settings
        self.steps: dict[int, list] = {}

    def go(self, world_size, micro_batch, workers, start, stop, kill_after=None):
        """Read steps `start` to `stop`; with `kill_after`, all ranks are killed as soon as that step is read."""
        data = DataArgs(train=self._train, window_shards=2, num_workers=workers, prefetch=2, **self.settings)
        paths = [self._folder / f"{start}_{rank}.jsonl" for rank in range(world_size)]
        ranks = [
            start_process(
                self._function, data, self._tokenizer, rank, world_size, micro_batch, start, stop, paths[rank]
            )
            for rank in range(world_size)
        ]
        if kill_after is not None:
            wanted = f'"step": {kill_after}'

            def all_have_read_it() -> bool:
                assert not any(rank.exitcode for rank in ranks)
                return all(wanted in text_of(path)() for path in paths)

            wait_for(all_have_read_it, f"step {kill_after} of all ranks")
            for rank in ranks:
                rank.kill()
        for rank in ranks:
            wait_for_end(rank, "a rank")
            assert rank.exitcode == (0 if kill_after is None else -9)
        lines = [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.endswith("}")]
        for line in sorted(lines, key=lambda line: (line["step"], line["position"])):
            if kill_after is None or line["step"] <= kill_after:
                self.steps.setdefault(line["step"], []).extend(line["rows"])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Shards of one and of five samples, an empty one, and a second source with fewer shards than ranks."""
    root = tmp_path_factory.mktemp("ledger")
    source = write_source(root / "source", num_images=30)
    first, second = root / "first", root / "second"
    arguments = ("coco", "--src", str(source), "--shard-size")
    assert convert(*arguments, "5", "--out", str(first), "--tokenizer-vocab", "300") == 0
    assert convert(*arguments, "1", "--out", str(second)) == 0
    (first / "train" / "000003.tar").write_bytes(b"\0" * 10240)  # a tar without members
    (second / "val" / "000000.tar").rename(first / "train" / "000004.tar")
    for path in sorted((second / "train").glob("*.tar"))[3:]:
        path.unlink()
    index_again(first / "train")
    index_again(second / "train")
    return first, second


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_kills_and_other_numbers_of_ranks_and_readers_change_nothing(sources, tmp_path, workers):
    first, second = sources
    assert 0 in ShardIndex(first / "train").samples_per_shard
    assert len(ShardIndex(second / "train").shards) == 3
    train = {str(first / "train"): 2, str(second / "train"): 0.5}
    (tmp_path / "straight").mkdir()
    straight = Run(tmp_path / "straight", train, first / "tokenizer")
    straight.go(1, 12, 0, 0, STEPS)
    stopped = Run(tmp_path, train, first / "tokenizer")
    stopped.go(2, 2, workers, 0, 1000, kill_after=2)
    stopped.go(1, 4, workers, 3, 6)
    stopped.go(3, 2, workers, 6, STEPS)
    assert sorted(stopped.steps) == list(range(STEPS))
    for step in range(STEPS):
        assert stopped.steps[step] == straight.steps[step], step
    rows = [tuple(row) for step in straight.steps.values() for row in step]
    indexes = {str(folder): ShardIndex(folder) for folder in (first / "train", second / "train")}
    for source, shard, number, key, *_ in rows:
        index = indexes[source]
        assert index.key([entry.name for entry in index.shards].index(shard), number) == key
    # Samples of two sources may have the same keys.
    assert {row[0] for row in rows} == set(indexes)
    # More than an epoch of the first source and several of the second: the captions, masks and crops are others.
    assert len({row[:4] for row in rows}) < len(set(rows)) == len(rows)
