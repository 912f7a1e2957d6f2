"""Whether a setting's shards have the samples that a task reads, before anything starts, and are the same on all ranks.

Source: none.
"""

import logging
from collections.abc import Sequence

from unimo3.data.index import ITEM_KINDS, NO_IMAGE, REINDEX, ShardIndex
from unimo3.distributed import all_gather_object
from unimo3.errors import DataError, no_answer

log = logging.getLogger(__name__)


def index_errors(name: str, index: ShardIndex, kind: str) -> list[str]:
    """Errors of shards as setting `name`, which needs samples with `kind`, one line per error."""
    try:
        error = _kind_error(index, kind, is_held_out=name == "data.val")
    except DataError as damage:
        if no_answer(damage):
            raise  # no setting is wrong
        return [f"{name}: {damage}"]
    finally:
        index.close()
    return [f"{name}: '{index.source}': {error}"] if error else []


def check_same_indexes(train: Sequence[ShardIndex], val: ShardIndex | None) -> None:
    """Refuse shards of which the ranks have read different indexes; every rank calls it.

    Shards may be replaced while ranks start, and nodes may have copies of their own.

    Raises:
        DataError: on every rank.
    """
    named = [("data.train", index) for index in train] + ([] if val is None else [("data.val", val)])
    of_ranks = all_gather_object([index.fingerprint for _, index in named])
    for number, (name, index) in enumerate(named):
        fingerprints = [of_rank[number] for of_rank in of_ranks]
        other = next((rank for rank, each in enumerate(fingerprints) if each != fingerprints[0]), None)
        if other is not None:
            raise DataError(
                f"{name}: '{index.source}': rank {other} has read the index {fingerprints[other][:12]}, rank 0 "
                f"{fingerprints[0][:12]}; let all nodes read the same shards, and replace none while a run starts"
            )


def _kind_error(index: ShardIndex, kind: str, is_held_out: bool) -> str:
    shards = f"({index.dataset}, {index.split}); name other shards"
    if not index.num_samples:
        return f"contains no sample {shards}"
    if kind in ITEM_KINDS and index.counts_kinds:
        return "" if index.items_per_shard(kind).any() else f"its samples have no {kind} {shards}"
    lacks, num_read = index.without(kind)
    # A sample without items is not read; one without a text is a bad one.
    if len(lacks) > (num_read - 1 if kind in ITEM_KINDS else num_read // 2):
        samples = "its samples" if len(lacks) == num_read else f"{len(lacks)} of {num_read} samples that were read"
        lacking = "image" if lacks[0].endswith(NO_IMAGE) else kind
        return f"{samples} have no {lacking} {shards} (sample {lacks[0]})"
    if kind in ITEM_KINDS:
        if not index.items_per_shard(kind).any():
            return f"its index counts no {kind}; {REINDEX}"
        if unreadable := index.check_uncounted(kind):
            problem = (
                f"its index counts no {kind} of {len(unreadable)} samples whose json cannot be read, such as "
                f"{unreadable[0]}"
            )
            if is_held_out:
                return f"{problem}; held-out samples must all be scored: fix them and prepare the shards again"
            log.warning("%s: %s; they are not trained on", index.source, problem)
    return ""
