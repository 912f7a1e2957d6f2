"""What every training process does first: watch, log, process group, signals, seeds."""

import logging
import os
import signal
import warnings
from typing import NamedTuple

import torch

from unimo3 import distributed
from unimo3.apex import warn_of_wrong_apex
from unimo3.launch import STOP_SIGNALS, end_with_launcher
from unimo3.training.heartbeat import lock_run
from unimo3.training.preempt import StopListener
from unimo3.training.run import RunArgs
from unimo3.training.watch import Watch


class RankProcess(NamedTuple):
    """A rank's process, which has joined the other ranks."""

    world: distributed.World
    listener: StopListener
    watch: Watch


def start_process(run: RunArgs, stall_after_s: float) -> RankProcess:
    """Lock the run and join the other ranks; from then until training, a stop signal ends the process with status 75.

    Args:
        run: its seed counts for all ranks; each rank's local draws (dropout) come from seed + rank.
        stall_after_s: see `TrainingArgs`.

    Raises:
        ConfigError: another process uses the run.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    end_with_launcher()
    lock_run(run.folder)
    # While ranks join, Python handles no signal: the default action ends the process, and nothing is lost.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    listener = StopListener()
    watch = Watch(run.folder, stall_after_s, listener.poll_files)
    world = distributed.init()
    listener.install()
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
    torch.manual_seed(run.seed + world.rank)
    watch.beat("build", 0)
    return RankProcess(world, listener, watch)
