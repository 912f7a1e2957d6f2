"""What every training process does first: signals, log, process group, seeds, one thread pool."""

import logging
import os
import warnings

import torch

from unimo3 import distributed
from unimo3.apex import warn_of_wrong_apex
from unimo3.training.preempt import StopRequest


def start_process(seed: int) -> tuple[distributed.World, StopRequest]:
    """Join the other ranks; from here on a stop signal is noted, not obeyed.

    Args:
        seed: of the run; each rank's own draws (dropout) come from seed + rank.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    world = distributed.init()
    stop = StopRequest().install()
    logging.basicConfig(
        level=logging.INFO if world.rank == 0 else logging.WARNING,
        format=f"%(asctime)s rank {world.rank} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for noisy in ("DeepSpeed", "transformers", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if world.rank == 0:
        warn_of_wrong_apex()
    torch.manual_seed(seed + world.rank)
    return world, stop
