"""Pretraining programs: each module is one, started with ``python -m``."""

from unimo3.startup import postpone_collections, use_utf8

use_utf8()
postpone_collections()
