"""Pretraining programs: each module is one, started with ``python -m``."""

from unimo3.startup import postpone_collections

postpone_collections()
