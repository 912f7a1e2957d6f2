"""Programs that submit, watch and judge Slurm jobs, started with ``python -m``; the job scripts are next to them."""

from unimo3.startup import use_utf8

use_utf8()
