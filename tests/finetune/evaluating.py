"""What a rank does to evaluate all tasks under ZeRO-3, without a training step."""

from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.choose import Choose
from finetune.nlvr2 import Nlvr2
from finetune.snli_ve import SnliVe
from finetune.task import HeldOut, InputSettings, Results, Row
from finetune.vqa import Vqa
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.index import ShardIndex
from unimo3.data.loader import ReaderArgs
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.distributed import World, world
from unimo3.model.initialization import initialize_weights
from unimo3.model.pretrained import load_exported, read_exported_config
from unimo3.training.ds_config import BatchPlan, read_ds_config
from unimo3.training.engine import build_engine, build_model
from unimo3.training.evaluation import Unguarded
from unimo3.training.optim import OptimArgs

# Persistent parameters would hide ranks that call different modules.
DS_CONFIG = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100000},
    "steps_per_print": 1000000000,
}
BATCH = 3


class Batches(Choose):
    """Choices, whose metrics have the keys that each pair was in a batch with."""

    def score(self, report: dict[str, Tensor], loaded: dict[str, Any]) -> list[Row]:
        return [row | {"batch": loaded["keys"]} for row in super().score(report, loaded)]

    def results(self, rows: list[Row]) -> Results:
        results = super().results(rows)
        batches = sorted((row["pair"], row["batch"]) for row in rows)
        return results._replace(metrics=results.metrics | {"batches": batches})


def evaluate(weights: Path, shards: Path, ds_config: Path) -> dict[str, list[dict]]:
    """Metrics and files of each task on this rank, with a random head.

    Args:
        weights: an export of pretraining.
        shards: contains vqa/, nlvr2/ and snli_ve/, whose ``val`` is evaluated, and sugarcrepe/ and winoground/, whose
            ``test``.
        ds_config: contains `DS_CONFIG`.
    """
    rank, size = world()
    reading = InputSettings(load_tokenizer(str(weights)), 12, ImageTransform(16), 0)
    answers = AnswerVocabulary.load(shards / "vqa" / "answers.json")
    read = read_ds_config(str(ds_config), BatchPlan(BATCH * size, BATCH, size), 1.0)
    results = {}
    tasks = {
        "vqa": Vqa(answers),
        "nlvr2": Nlvr2(),
        "snli_ve": SnliVe(),
        "sugarcrepe": Choose(),
        "winoground": Batches(),
    }
    for name, task in tasks.items():
        config = read_exported_config(str(weights))
        task.configure(config)
        model = build_model(read, lambda task=task, config=config: task.model_class()(config))
        initialize_weights(model, 2, std=0.8)
        load_exported(model, str(weights), fresh=task.fresh)
        engine = build_engine(task.objective(model), model, read, OptimArgs())
        index = ShardIndex(shards / name / ("test" if isinstance(task, Choose) else "val"))
        held_out = HeldOut(index, reading, World(rank, rank, size), BATCH, ReaderArgs(0, 1))
        results[name] = list(task.evaluate(engine, held_out, Unguarded()))
    return results
