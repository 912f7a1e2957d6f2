"""What a fine-tuning task is: its model, samples, loss, evaluation and predictor.

A new task is a file that has these and its settings; `finetune/tasks.py` lists it.

Source: open_clip's open_clip_train/task for the idea that a task owns batch -> losses and its report.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from unimo3.data.args import ReaderArgs
from unimo3.data.index import ShardIndex
from unimo3.data.order import full_batch_positions
from unimo3.distributed import World, all_gather_object
from unimo3.engine import Engine
from unimo3.errors import DataError
from unimo3.training.run import Saveable

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from unimo3.data.samples import Samples
    from unimo3.data.transforms import ImageTransform
    from unimo3.inference.predictors import Predictor
    from unimo3.model.config import Unimo3Config
    from unimo3.model.unimo3 import Unimo3PreTrainedModel
    from unimo3.training.evaluation import Guard

log = logging.getLogger(__name__)

Row = dict[str, Any]


class InputSettings(NamedTuple):
    """How bytes become inputs; see `Samples`."""

    tokenizer: PreTrainedTokenizerBase
    max_text_tokens: int
    transform: ImageTransform
    seed: int


class HeldOut(NamedTuple):
    """Data to evaluate on, and how the ranks share it.

    Attributes:
        batch: rows one rank computes at a time.
    """

    shards: ShardIndex
    input_settings: InputSettings
    world: World
    batch: int
    reader: ReaderArgs


class Results(NamedTuple):
    """Results of one evaluation, the same on every rank.

    Attributes:
        metrics: by name; of data whose answers are not known there are none.
        files: contents by name, such as ``predictions.json``; the name gets the split's before its ending.
    """

    metrics: dict[str, float]
    files: dict[str, str]


class Task(ABC):
    """One downstream task.

    Attributes:
        kind: entries of a sample's ``json`` that it is about, such as ``questions``.
        unit: what a row of a batch is, such as ``question``.
        num_images: of a row.
        architecture: class of `unimo3.model.downstream` that has the task's head.
        predictor: makes answers of what the model returns, for `finetune.predict`.
        fresh: pattern of parameters that pretraining's weights lack and that start random.
        contrasts: whether its loss compares the rows of a micro-step with each other.
        best_metric: by which the best checkpoint is chosen; larger is better.
    """

    kind: ClassVar[str]
    unit: ClassVar[str]
    num_images: ClassVar[int] = 1
    architecture: ClassVar[str]
    predictor: ClassVar[type[Predictor]]
    fresh: ClassVar[str] = r"^$"
    contrasts: ClassVar[bool] = False
    best_metric: ClassVar[str]

    @classmethod
    def model_class(cls) -> type[Unimo3PreTrainedModel]:
        """The class that `architecture` names."""
        from unimo3.model import downstream

        model_class: type[Unimo3PreTrainedModel] = getattr(downstream, cls.architecture)
        return model_class

    def configure(self, config: Unimo3Config) -> None:  # noqa: B027  (retrieval has no classes)
        """Give the model's configuration the head's classes."""

    def model_files(self) -> Sequence[Saveable]:
        """What an exported folder needs beyond configuration and processor."""
        return ()

    @abstractmethod
    def samples(self, index: ShardIndex, input_settings: InputSettings) -> Samples:
        """Inputs from shards, for training and for rows that are scored."""

    @abstractmethod
    def blank_labels(self, num_rows: int) -> dict[str, Tensor]:
        """What a batch has in addition to images and texts, for planning: on the meta device, except for what
        identifies rows."""

    @abstractmethod
    def objective(self, model: Any) -> nn.Module:
        """The module an engine trains: batch -> ``loss`` and further metrics; its `model` attribute is `model`."""

    @abstractmethod
    def describe(self, engine: Engine, loaded: dict[str, Any]) -> list[str]:
        """What is predicted for each row of a batch, for people; every rank calls it."""

    @abstractmethod
    def evaluate(self, engine: Engine, held_out: HeldOut, guard: Guard) -> Results | None:
        """Metrics and files of held-out data; None if the run must end before.

        Every rank calls it, and must call the engine's modules as often as the others: batches go through `guard`.
        """


class RowTask(Task):
    """A task whose held-out rows are scored separately.

    Attributes:
        id_field: of a row, by which a file of predictions names it.
        has_unique_ids: whether the data set's format forbids two rows of one id.
    """

    id_field: ClassVar[str]
    has_unique_ids: ClassVar[bool] = True

    @abstractmethod
    def score(self, report: dict[str, Tensor], loaded: dict[str, Any]) -> list[Row]:
        """What is predicted for each row of a batch and how right it is, as plain values.

        Args:
            report: what the objective gave in evaluation.
            loaded: the batch.
        """

    @abstractmethod
    def results(self, rows: list[Row]) -> Results:
        """Metrics and files of all rows, each unit's once, in no particular order."""

    def describe(self, engine: Engine, loaded: dict[str, Any]) -> list[str]:
        """See `Task`: the row's fields."""
        import torch

        rows = score_batch(self, engine, dict(loaded), torch.ones(len(loaded["input_ids"]), dtype=torch.bool))
        shown = [{name: value for name, value in row.items() if isinstance(value, str | int | float)} for row in rows]
        return [", ".join(f"{name} {value}" for name, value in fields.items()) for fields in shown]

    def evaluate(self, engine: Engine, held_out: HeldOut, guard: Guard) -> Results | None:
        """See `Task`.

        Batches are the same at any number of ranks, so scores are equal to the last bit. A file of predictions has
        every id of the split once. Where the shards lack some, it is named ``_incomplete``.

        Raises:
            DataError: there is no row to score, or two rows have one id.
        """
        from unimo3.data.loader import planned_batches

        samples = self.samples(held_out.shards, held_out.input_settings)
        num_units = samples.units_per_shard.sum()
        if not num_units:
            raise DataError(
                f"data.val: '{held_out.shards.source}': contains no {self.kind} to score; name other shards"
            )
        plan = full_batch_positions(num_units, held_out.world.rank, held_out.world.size, held_out.batch)
        batches = planned_batches(samples, plan, held_out.reader)
        local_rows: list[Row] = []
        for loaded, counts in guard.batches(batches):
            local_rows += score_batch(self, engine, loaded, counts)
        if guard.is_stopped:
            return None
        rows = [row for part in all_gather_object(local_rows) for row in part]
        assert len(rows) == num_units
        self._check_ids(rows, held_out.shards)
        results, missing = self.results(rows), held_out.shards.missing_ids
        if not missing:
            return results
        if held_out.world.rank == 0:
            log.warning(
                "data.val: '%s': lacks %d ids of its split, such as %s: the predictions are not complete, and servers "
                "refuse them; prepare the shards again with all images",
                held_out.shards.source,
                len(missing),
                ", ".join(map(ascii, missing[:3])),
            )
        return Results(results.metrics, {_incomplete(name): content for name, content in results.files.items()})

    def _check_ids(self, rows: list[Row], shards: ShardIndex) -> None:
        # Evaluation programs read 5 and "5" as one id.
        counts = Counter(str(row[self.id_field]) for row in rows)
        first = {str(row[self.id_field]): row[self.id_field] for row in reversed(rows)}
        repeated = [ascii(first[name]) for name, count in counts.items() if count > 1]
        if repeated and self.has_unique_ids:
            occur = f"{self.id_field} occurs" if len(repeated) == 1 else f"{self.id_field}s occur"
            raise DataError(
                f"data.val: '{shards.source}': {len(repeated)} {occur} more than once, such as "
                f"{', '.join(repeated[:3])}; a file of predictions has each once: remove the repeated records and "
                "prepare the shards again"
            )


def _incomplete(name: str) -> str:
    stem, dot, ending = name.partition(".")
    return f"{stem}_incomplete{dot}{ending}" if stem == "predictions" else name


def score_batch(task: RowTask, engine: Engine, loaded: dict[str, Any], counts: Tensor) -> list[Row]:
    """The rows of a batch that count.

    Args:
        counts: [B] bool; see `planned_batches`.
    """
    import torch

    from unimo3.training.evaluation import to_device

    engine.eval()
    with torch.no_grad():
        rows = task.score(engine(to_device(loaded, engine.device)), loaded)
    return [row for row, is_counted in zip(rows, counts.tolist(), strict=True) if is_counted]
