"""Fine-tuning for visual question answering: exported weights -> accuracy by the official rule and predictions.

Started once a rank; starting it again resumes. The result is RUN/predictions.json in VQAv2's submission format and
RUN/accuracy.json.

Source: METER, arXiv 2111.02387, for the settings; https://visualqa.org for the format.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.args import FinetuneConfig
from finetune.task import InputSettings, Results, Row, RowTask
from unimo3 import config
from unimo3.checkpoint.initial_weights import config_of, model_files_of
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.index import ShardIndex
from unimo3.data.remote import is_remote
from unimo3.data.samples import VqaSamples
from unimo3.errors import ConfigError, DataError, exit_with_status
from unimo3.inference.predictors import VqaPredictor
from unimo3.metrics.groups import accuracy_by_group
from unimo3.metrics.vqa import vqa_accuracy

if TYPE_CHECKING:
    from torch import Tensor

    from unimo3.model.config import Unimo3Config
    from unimo3.model.downstream import Unimo3ForVisualQuestionAnswering
    from unimo3.objectives.vqa import VqaLoss

log = logging.getLogger(__name__)

PUBLISHED_ANSWERS = 3129
"""Answers of VQAv2 that occur at least nine times; METER has as many classes."""


class Vqa(RowTask):
    """Questions about images, answered from a vocabulary."""

    kind = "questions"
    unit = "question"
    id_field = "question_id"
    architecture = "Unimo3ForVisualQuestionAnswering"
    predictor = VqaPredictor
    fresh = r"^vqa_head\."
    best_metric = "accuracy_overall"

    def __init__(self, answers: AnswerVocabulary):
        self._answers = answers

    def configure(self, config: "Unimo3Config") -> None:
        """One class an answer."""
        config.num_answers = len(self._answers)

    def model_files(self) -> tuple[AnswerVocabulary]:
        """``answers.json``."""
        return (self._answers,)

    def samples(self, index: ShardIndex, input_settings: InputSettings) -> VqaSamples:
        """Questions."""
        tokenizer, max_text_tokens, transform, seed = input_settings
        return VqaSamples(index, tokenizer, max_text_tokens, transform, self._answers, seed)

    def blank_labels(self, num_rows: int) -> "dict[str, Tensor]":
        """Soft targets."""
        import torch

        return {"targets": torch.empty(num_rows, len(self._answers), device="meta")}

    def objective(self, model: "Unimo3ForVisualQuestionAnswering") -> "VqaLoss":
        """Soft targets over the vocabulary."""
        from unimo3.objectives.vqa import VqaLoss

        return VqaLoss(model)

    def score(self, report: "dict[str, Tensor]", loaded: dict[str, Any]) -> list[Row]:
        """The best answer, its official accuracy (None where no answers are known), its type and toy granularity.

        Raises:
            DataError: a question has no id.
        """
        best = [self._answers.answers[number] for number in report["logits"].argmax(dim=-1).tolist()]
        return [
            {
                "question_id": _id_of(question, key),
                "answer": answer,
                "groups": tuple(str(question.get(name) or "") for name in ("answer_type", "granularity")),
                "accuracy": vqa_accuracy(answer, question["answers"]) if question.get("answers") else None,
            }
            for question, answer, key in zip(loaded["question"], best, loaded["keys"], strict=True)
        ]

    def results(self, rows: list[Row]) -> Results:
        """The accuracies of the questions whose answers are known, and the submission file of all."""
        submission = sorted(
            ({"question_id": row["question_id"], "answer": row["answer"]} for row in rows),
            key=lambda entry: (isinstance(entry["question_id"], str), entry["question_id"]),
        )
        files = {"predictions.json": json.dumps(submission) + "\n"}
        scored = [row for row in rows if row["accuracy"] is not None]
        if not scored:
            return Results({}, files)
        if len(scored) < len(rows):
            log.warning(
                "%d of %d questions have no answers: the accuracies are of the others",
                len(rows) - len(scored),
                len(rows),
            )
        accuracies: dict[str, float] = {}
        for kind in range(2):
            accuracies |= accuracy_by_group((row["groups"][kind], row["accuracy"]) for row in scored)
        files["accuracy.json"] = json.dumps(accuracies, indent=1) + "\n"
        return Results({f"accuracy_{group}": accuracy for group, accuracy in accuracies.items()}, files)


def _id_of(question: dict[str, Any], key: str) -> int | str:
    identity = question.get("question_id")
    if isinstance(identity, bool) or not isinstance(identity, int | str):
        raise DataError(
            f"sample {key}: question_id is {identity!r}; held-out questions need a number or a text: fix the source "
            "and prepare the shards again"
        )
    return identity


@dataclass(frozen=True)
class VqaConfig(FinetuneConfig):
    """All settings of a VQA fine-tuning run."""

    answers: str = ""
    """Answer vocabulary. If empty: that of the run's head or of weights that were tuned for VQA, else the
    answers.json next to the training shards. Where none of these exists, a plan counts 3129, the published number."""

    task = Vqa

    def slow_errors(self) -> list[str]:
        """Return where weights, tokenizer, answers and task do not fit together, one line per error."""
        errors = super().slow_errors()
        # Where the vocabulary is follows from these.
        if any(problem.startswith(("init:", "eval_only:")) for problem in errors):
            return errors
        return errors + (self.answers_errors() or self._target_errors())

    def _target_errors(self) -> list[str]:
        """Return training shards whose questions have no answer of the vocabulary, one line per error."""
        assert self.answers_path is not None, "`answers_errors` reports it"
        vocabulary = AnswerVocabulary.load(self.answers_path)
        errors = []
        for source in [] if self.eval_only else self.data.sources:
            try:
                asked = self.data.probed_answers(source)
            except DataError:
                continue  # `shard_errors` reports it
            if asked and not any(vocabulary.soft_targets(answers).any() for answers in asked):
                errors.append(
                    f"data.train: '{source}': none of {len(asked)} questions that were read has an answer of "
                    f"{self.answers_path} in its answers; prepare the shards again, or name their own answers.json"
                )
        return errors

    def answers_errors(self) -> list[str]:
        """Return why there is no answer vocabulary, or none that fits the weights."""
        path, tuned = self.answers_path, self._tuned_answers
        if path is None:
            return ["answers: '': name the answer vocabulary, an answers.json, where data.train is no single folder"]
        try:
            answers = AnswerVocabulary.load(path)
            if tuned is None or AnswerVocabulary.load(tuned).answers == answers.answers:
                return []
        except DataError as error:
            return [f"answers: {error}"]
        return [
            f"answers: '{path}': lists {len(answers)} answers that are not those of the head, which was tuned on "
            f"{tuned}; leave it out"
        ]

    @property
    def answers_path(self) -> Path | None:
        """File of the answer vocabulary; None where no setting leads to one."""
        if self.answers:
            return Path(self.answers)
        if self._tuned_answers is not None:
            return self._tuned_answers
        sources = list(self.data.sources)
        if len(sources) != 1 or not sources[0] or is_remote(sources[0]):
            return None
        return Path(sources[0]).parent / "answers.json"

    def build_task(self) -> Vqa:
        """The task, with its vocabulary."""
        assert self.answers_path is not None, "`validate` refuses settings without a vocabulary"
        return Vqa(AnswerVocabulary.load(self.answers_path))

    def planned_task(self) -> Vqa:
        """The task, with its vocabulary or, before there is one, with one of the published size."""
        if self._has_answers:
            return self.build_task()
        return Vqa(AnswerVocabulary([str(number) for number in range(PUBLISHED_ANSWERS)]))

    def planned_errors(self) -> list[str]:
        """Errors of a vocabulary that is named or exists."""
        return self.answers_errors() if self._has_answers else []

    @property
    def _has_answers(self) -> bool:
        return bool(self.answers) or (self.answers_path is not None and self.answers_path.is_file())

    @property
    def _tuned_answers(self) -> Path | None:
        """The vocabulary of the head that the run continues with or that `init`'s weights have, if there is one."""
        try:
            has_head = config_of(self.init, self.run.folder).num_answers > 0
        except ConfigError:
            return None  # the check of the weights reports it
        path = Path(model_files_of(self.init, self.run.folder)) / "answers.json"
        return path if has_head and path.is_file() else None


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Train until done, interrupted or in error; unimo3/errors.py lists the exit statuses."""
    settings = config.parse(VqaConfig, argv, "python -m finetune.vqa", __doc__ or "")
    from finetune.program import finetune

    finetune(settings, settings.build_task())


if __name__ == "__main__":
    main()
