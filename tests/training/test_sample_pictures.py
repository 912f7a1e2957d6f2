"""Pictures of an evaluation with two ranks: a rank that cannot read its samples delays and ends no other."""

from types import SimpleNamespace

import pytest
import torch

from tests.data.conftest import coco, source  # noqa: F401  (fixtures)
from tests.spawn import run_ranks
from tests.tiny import tiny_config, tiny_pretraining_model
from unimo3.data.index import ShardIndex
from unimo3.data.samples import PretrainSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.distributed import sum_over_ranks, world
from unimo3.errors import DataError
from unimo3.objectives.args import ObjectivesArgs
from unimo3.objectives.base import PretrainingLoss
from unimo3.training.sample_pictures import sample_pictures


class Agreeing:
    """Agrees with the other ranks before each batch and at the end, as `StopGuard`."""

    is_stopped = False

    def batches(self, batches):
        for batch in [*batches, None]:
            assert int(sum_over_ranks(torch.ones(1))[0]) == 2
            if batch is not None:
                yield batch


def show(shards, folder, damaged_rank) -> list[str]:
    """Names of the pictures on this rank; `damaged_rank` cannot read."""
    rank, size = world()
    torch.manual_seed(0)
    tokenizer = load_tokenizer(folder)
    text = tiny_config().text_config.to_dict() | {"vocab_size": len(tokenizer), "max_position_embeddings": 40}
    vision = {"image_size": 16, "overrides": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}}
    task = PretrainingLoss(tiny_pretraining_model(text_config=text, vision_config=vision), ObjectivesArgs().build(0))
    samples = PretrainSamples(ShardIndex(shards), tokenizer, 16, ImageTransform(16, "none", 1.0), 0.15, seed=0)
    if rank == damaged_rank:
        samples.build = cannot_read
    engine = SimpleNamespace(module=task, device=torch.device("cpu"), eval=task.eval)
    pictures = sample_pictures(engine, samples, SimpleNamespace(rank=rank, size=size), tokenizer, Agreeing())
    assert sum_over_ranks(torch.tensor([1, 2, 3])).tolist() == [2, 4, 6]  # the next collective is the same everywhere
    return sorted(pictures)


def cannot_read(*_):
    raise DataError("000000.tar: cannot be read")


@pytest.mark.integration
@pytest.mark.parametrize(("damaged_rank", "expected"), [(None, [["attention"], []]), (0, [[], []]), (1, [[], []])])
def test_all_ranks_show_pictures_or_none_does(coco, damaged_rank, expected):  # noqa: F811
    assert run_ranks(2, show, str(coco / "val"), str(coco / "tokenizer"), damaged_rank) == expected
