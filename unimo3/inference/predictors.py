"""Rows -> answers with scores. A task of `finetune/` names its predictor.

Source: METER, arXiv 2111.02387, for what each head's logits mean; ALBEF, arXiv 2107.07651, for matching.
"""

# Shapes: B rows, I images of a row, S pixels a side, C classes.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from unimo3.data.answers import AnswerVocabulary
from unimo3.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from unimo3.inference.exported_model import Loaded
    from unimo3.inference.inputs import Prepared

Answers = list[dict[str, Any]]
"""The best first; plain values."""


class Predictor(ABC):
    """Answers of a model with a task's head.

    Attributes:
        searches: whether it orders several images or texts, or those of an index, by how well they match.
    """

    searches: ClassVar[bool] = False

    def __init__(self, loaded: Loaded):
        self.loaded = loaded

    @abstractmethod
    def predict(self, rows: Sequence[Prepared], top: int) -> list[Answers]:
        """Answers to each of B rows, at most `top`."""

    def _logits(self, rows: Sequence[Prepared]) -> Any:
        import torch

        from unimo3.inference.inputs import tokens

        images = torch.stack([row.pixels for row in rows]).to(self.loaded.device)  # [B, I, 3, S, S]
        if images.shape[1] == 1:
            images = images[:, 0]
        with torch.inference_mode():
            return self.loaded.model(**tokens(self.loaded, [row.text for row in rows]), pixel_values=images)


class ClassPredictor(Predictor):
    """A task that chooses among named classes: each answer has ``answer`` and ``score``."""

    def __init__(self, loaded: Loaded):
        super().__init__(loaded)
        self.names = self._class_names()

    def predict(self, rows: Sequence[Prepared], top: int) -> list[Answers]:
        """See `Predictor`."""
        scores = self._scores(self._logits(rows).logits.float()).cpu()
        # A stable order, as argmax: of equal scores the first class.
        best = scores.sort(dim=-1, descending=True, stable=True)
        return [
            [{"answer": self.names[number], "score": score} for number, score in zip(numbers, values, strict=True)]
            for numbers, values in zip(best.indices[:, :top].tolist(), best.values[:, :top].tolist(), strict=True)
        ]

    def _class_names(self) -> list[str]:
        names: Any = self.loaded.config.id2label
        return [names[number] for number in sorted(names)]

    def _scores(self, logits: Tensor) -> Tensor:
        """[B, C] logits -> what users get; here probabilities that sum to one."""
        return logits.softmax(dim=-1)


class VqaPredictor(ClassPredictor):
    """Answers to questions; a score is the accuracy the model expects of the answer, for each by itself."""

    def _class_names(self) -> list[str]:
        path = self.loaded.folder / "answers.json"
        try:
            names = AnswerVocabulary.load(path).answers
        except DataError as error:
            raise ConfigError(
                f"--weights '{self.loaded.folder}': answers.json cannot be read ({error.__cause__ or error}); name an "
                "export of a VQA run"
            ) from error
        if len(names) != self.loaded.config.num_answers:
            raise ConfigError(
                f"--weights '{self.loaded.folder}': answers.json lists {len(names)} answers, the model scores "
                f"{self.loaded.config.num_answers}; copy the answers.json that the weights were exported with"
            )
        return names

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


class MatchPredictor(Predictor):
    """Whether image and text belong together: ``match``, a probability, and ``similarity`` of the towers, a cosine."""

    searches = True

    def predict(self, rows: Sequence[Prepared], top: int) -> list[Answers]:
        """See `Predictor`; there is one answer a row."""
        out = self._logits(rows)
        matches = out.logits.float().softmax(dim=-1)[:, 1].tolist()
        similarities = (out.text_embeds * out.image_embeds).sum(dim=-1).tolist()
        return [
            [{"match": match, "similarity": similarity}]
            for match, similarity in zip(matches, similarities, strict=True)
        ]
