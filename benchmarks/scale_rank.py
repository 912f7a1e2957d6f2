"""One rank of pretraining whose watch has the intervals of another number of ranks.

    python -m benchmarks.scale_rank NUM_RANKS ARGUMENTS-OF-pretrain.train

Source: none.
"""

import functools
import sys

from pretrain import train
from unimo3.training import watch

if __name__ == "__main__":
    num_ranks = int(sys.argv[1])
    for name in ("poll_interval_s", "heartbeat_interval_s"):
        stock = getattr(watch, name)
        setattr(watch, name, functools.partial(lambda stock, num_ranks, _: stock(num_ranks), stock, num_ranks))
    train.main(sys.argv[2:])
