"""Fine-tuning programs: each task is one, started with ``python -m``."""

from unimo3.startup import postpone_collections

postpone_collections()
