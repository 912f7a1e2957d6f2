"""Recall of a held-out set, by a shortlist of the towers that the fusion encoder puts in order, or of all pairs.

Source: ALBEF, arXiv 2107.07651, section 4; METER, arXiv 2111.02387, which scores all pairs.
"""

import torch

from unimo3.data.captioned import CaptionedImages
from unimo3.data.loader import ReaderArgs
from unimo3.distributed import World, all_gather_object
from unimo3.engine import Engine
from unimo3.errors import ConfigError, DataError
from unimo3.metrics.recall import mean_of, recalls
from unimo3.training.evaluation import Guard
from unimo3.training.metrics import Metrics
from unimo3.training.retrieval.args import RankingArgs
from unimo3.training.retrieval.matching import final_ranks, local_pairs, score
from unimo3.training.retrieval.shortlist import galleries_of
from unimo3.training.retrieval.states import Towers


@torch.no_grad()
def held_out_recall(
    engine: Engine,
    samples: CaptionedImages,
    world: World,
    batch: int,
    reader: ReaderArgs,
    ranking: RankingArgs,
    guard: Guard,
) -> Metrics | None:
    """Recall at 1, 5 and 10 both ways; every rank calls it. None if the run must end.

    The metrics are the same at any number of ranks.

    Args:
        engine: over a `RetrievalLoss`.
        batch: images or texts a rank encodes at a time.

    Returns:
        ``tr_at_1`` and so on (an image's texts), ``ir_at_1`` and so on (a text's image), ``recall_mean`` of the six;
        with ``_towers`` the same without the fusion encoder, with ``_fold`` their means over folds; ``num_pairs``, how
        many the fusion encoder scored over all ranks.

    Raises:
        ConfigError: the images do not divide into folds.
        DataError: there are fewer than two images.
    """
    engine.eval()
    num_images = int(samples.units_per_shard.sum())
    if num_images < 2:
        raise DataError(
            f"{samples.index.source}: has {num_images} image by the image_id of its samples; a ranking needs several: "
            "correct image_id, or name other shards"
        )
    errors = ranking.fold_errors(num_images)
    if errors:
        raise ConfigError(errors)
    towers = Towers(engine, samples, world, batch, reader, ranking.cache_gb * 1e9, guard)
    embeddings = towers.embed()
    if embeddings is None:
        return None
    galleries = galleries_of(embeddings, ranking.fold_images, ranking.shortlist, engine.device)
    image_numbers = towers.local_images()
    pairs = local_pairs(galleries, image_numbers[image_numbers >= 0], len(embeddings.images), len(embeddings.texts))
    scored = score(engine, towers, pairs, len(embeddings.texts), batch, ranking.pair_batch, guard)
    if guard.is_stopped:
        return None
    by_fusion = [recalls(*positions) for positions in final_ranks(galleries, scored, embeddings, engine.device)]
    by_towers = [recalls(of_images.ranks, of_texts.ranks) for of_images, of_texts in galleries]
    num_pairs = sum(all_gather_object(len(pairs)))
    return _metrics(by_fusion) | _metrics(by_towers, "_towers") | {"num_pairs": num_pairs}


def _metrics(galleries: list[dict[str, float]], suffix: str = "") -> Metrics:
    complete, *folds = galleries
    metrics: Metrics = {f"{name}{suffix}": value for name, value in complete.items()}
    if folds:
        metrics |= {f"{name}{suffix}_fold": value for name, value in mean_of(folds).items()}
    return metrics
