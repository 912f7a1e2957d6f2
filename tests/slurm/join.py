"""A rank that only joins the others: ``python -m tests.slurm.join --config FILE --run.name NAME ...``.

It notes in the folder JOINED who has joined, and leaves when the file LEAVE is there.
"""

import os
import sys
import time
from pathlib import Path

from unimo3.distributed import all_gather_object, init

name = sys.argv[sys.argv.index("--run.name") + 1]
world = init()
ranks = all_gather_object(world.rank)
Path(os.environ["JOINED"], f"{name}_{world.rank}").write_text(str(ranks))
while not Path(os.environ["LEAVE"]).exists():
    time.sleep(0.05)  # between two looks
