"""The fine-tuning tasks by name. A new task is a separate file, its recipes, and a line here."""

from finetune.nlvr2 import Nlvr2Config
from finetune.program import FinetuneConfig
from finetune.retrieval import RetrievalConfig
from finetune.snli_ve import SnliVeConfig
from finetune.vqa import VqaConfig

TASKS: dict[str, type[FinetuneConfig]] = {
    "vqa": VqaConfig,
    "nlvr2": Nlvr2Config,
    "snli_ve": SnliVeConfig,
    "retrieval": RetrievalConfig,
}
