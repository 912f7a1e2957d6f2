"""Retrieval's evaluation as each rank does it, on a ZeRO-3 engine."""

from pathlib import Path

import torch

from tests.tiny import tiny_config
from unimo3.data.captioned import CaptionedImages
from unimo3.data.index import ShardIndex
from unimo3.data.loader import ReaderArgs
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.distributed import World, world
from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
from unimo3.model.initialization import initialize_weights
from unimo3.objectives.retrieval import RetrievalLoss
from unimo3.training.evaluation import Unguarded
from unimo3.training.retrieval.args import RankingArgs
from unimo3.training.retrieval.evaluation import held_out_recall
from unimo3.training.retrieval.matching import local_pairs, score
from unimo3.training.retrieval.shortlist import galleries_of
from unimo3.training.retrieval.states import Towers

READER = ReaderArgs(0, 1)
BATCH = 4
ROOT = Path(__file__).parents[3]
# What fits in memory at once, and what does not: about one batch of texts and one of images.
ROOMY, TIGHT = 1.0, 1e-6
SETTINGS = {
    "shortlist": RankingArgs(shortlist=3, pair_batch=5, cache_gb=ROOMY),
    "blocks": RankingArgs(shortlist=3, pair_batch=5, cache_gb=TIGHT),
    "some_blocks": RankingArgs(shortlist=3, pair_batch=5, cache_gb=1e-4),
    "few_batches": RankingArgs(shortlist=3, pair_batch=32, cache_gb=1e-4),
    "exact": RankingArgs(shortlist=0, pair_batch=16, cache_gb=ROOMY),
    "folds": RankingArgs(shortlist=2, pair_batch=8, cache_gb=ROOMY, fold_images=11),
}


def config(vocab_size):
    """Two tower states a token, as bridges read them."""
    model_config = tiny_config(bridge=True, num_hidden_layers=2)
    model_config.text_config.vocab_size = vocab_size
    return model_config


def captioned(shards):
    """Images of 16 pixels with all their captions."""
    tokenizer = load_tokenizer(str(shards / "tokenizer"))
    return CaptionedImages(ShardIndex(shards / "train"), tokenizer, 16, ImageTransform(16)), len(tokenizer)


def plain_task(shards):
    """The task in this process, as evaluations take it: they ask an engine for its device."""
    model = Unimo3ForImageAndTextRetrieval(config(captioned(shards)[1]))
    initialize_weights(model, 3, std=0.2)
    task = RetrievalLoss(model, 0)
    task.device = torch.device("cpu")
    return task


def metrics_of_engine(shards, name):
    """Evaluate and train a step, twice: metrics and losses."""
    from unimo3.training.ds_config import BatchPlan, read_ds_config
    from unimo3.training.engine import build_engine, build_model
    from unimo3.training.optim import OptimArgs

    rank, size = world()
    samples, vocab_size = captioned(shards)
    ds_config = read_ds_config(str(ROOT / "ds_configs/zero3_fp32.json"), BatchPlan(4 * size, 4, size), 1.0)
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = build_model(ds_config, lambda: Unimo3ForImageAndTextRetrieval(config(vocab_size)))
    initialize_weights(model, 3, std=0.2)
    engine = build_engine(RetrievalLoss(model, 0), model, ds_config, OptimArgs(lr=1e-12))
    metrics, losses = [], []
    for _ in range(2):
        metrics.append(held_out_recall(engine, samples, here(), BATCH, READER, SETTINGS[name], Unguarded()))
        engine.train()
        report = engine(_training_batch(rank))
        engine.backward(report["loss"])
        engine.step()
        losses.append(report["loss"].item())
    return metrics, losses


def _training_batch(rank):
    from tests.tiny import tiny_batch

    batch = tiny_batch(4, seed=rank)
    return batch | {"image_id": batch["image_id"] + 4 * rank, "positions": batch["positions"] + 4 * rank}


class CutAfter:
    """A guard that lets a number of batches pass, then cuts; alike on all ranks."""

    def __init__(self, num_batches):
        self.is_stopped = False
        self.num_left = num_batches

    def batches(self, batches):
        for batch in batches:
            self.num_left -= 1
            if self.num_left < 0:
                self.is_stopped = True
                return
            yield batch


@torch.no_grad()
def scores_of(task, shards, ranking):
    """This rank's pairs and their scores."""
    task.eval()
    samples, _ = captioned(shards)
    towers = Towers(task, samples, here(), BATCH, READER, ranking.cache_gb * 1e9, Unguarded())
    embeddings = towers.embed()
    galleries = galleries_of(embeddings, 0, ranking.shortlist, task.device)
    images = towers.local_images()
    pairs = local_pairs(galleries, images[images >= 0], len(embeddings.images), len(embeddings.texts))
    return score(task, towers, pairs, len(embeddings.texts), BATCH, ranking.pair_batch, Unguarded())


def metrics_and_cuts(shards, names, numbers):
    """Metrics with some of the settings, and the scores of one; whether evaluations were cut, and are without metrics,
    that are to be cut after so many batches."""
    task = plain_task(shards)
    samples, _ = captioned(shards)
    metrics = {
        name: held_out_recall(task, samples, here(), BATCH, READER, SETTINGS[name], Unguarded()) for name in names
    }
    cuts = []
    for number in numbers:
        guard = CutAfter(number)
        result = held_out_recall(task, samples, here(), BATCH, READER, SETTINGS["some_blocks"], guard)
        cuts.append((guard.is_stopped, result is None))
    return metrics, scores_of(task, shards, SETTINGS["some_blocks"]), cuts


def here():
    """This process as one of the ranks."""
    rank, size = world()
    return World(rank, rank, size)
