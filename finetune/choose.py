"""Evaluation of choices between captions or images, without training: pretrained weights -> accuracy, by ITM and ITC.

Started once a rank. The result is RUN/report.md, RUN/accuracy.json and RUN/predictions.jsonl. The matching head (ITM)
and the contrastive head (ITC) score each image with each caption.

Source: SugarCrepe, arXiv 2306.14610; Winoground, arXiv 2204.03162.
"""

import json
import logging
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.args import FinetuneConfig
from finetune.task import InputSettings, Results, Row, RowTask
from unimo3 import config
from unimo3.data.choices import ChoiceSamples
from unimo3.data.index import ShardIndex
from unimo3.errors import exit_with_status
from unimo3.inference.predictors import MatchPredictor
from unimo3.metrics.choice import choice_chance, choice_marks
from unimo3.metrics.groups import accuracy_by_group

if TYPE_CHECKING:
    from torch import Tensor

    from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
    from unimo3.objectives.choice import ChoiceScores

log = logging.getLogger(__name__)

_HEADS = ("itm", "itc")


class Choose(RowTask):
    """Captions to choose from for an image, or two images and two captions."""

    kind = "choices"
    unit = "pair"
    id_field = "pair"
    architecture = "Unimo3ForImageAndTextRetrieval"
    predictor = MatchPredictor
    best_metric = "itm_accuracy"  # nothing is trained, so none is chosen

    def samples(self, index: ShardIndex, input_settings: InputSettings) -> ChoiceSamples:
        """Each image with each caption of its sample."""
        return ChoiceSamples(index, *input_settings)

    def blank_labels(self, num_rows: int) -> "dict[str, Tensor]":
        """None: nothing is trained."""
        return {}

    def objective(self, model: "Unimo3ForImageAndTextRetrieval") -> "ChoiceScores":
        """The scores by both heads."""
        from unimo3.objectives.choice import ChoiceScores

        return ChoiceScores(model)

    def score(self, report: "dict[str, Tensor]", loaded: dict[str, Any]) -> list[Row]:
        """Each pair's scores."""
        return [
            {"pair": f"{example.identifier}#{pair.image}-{pair.text}", "example": example, "itm": itm, "itc": itc}
            for example, pair, itm, itc in zip(
                loaded["example"], loaded["pair"], report["itm"].tolist(), report["itc"].tolist(), strict=True
            )
        ]

    def results(self, rows: list[Row]) -> Results:
        """Accuracies by category, by both heads and of a guess, and the scores of each example."""
        examples = {row["example"].identifier: row["example"] for row in rows}
        of_pair = {row["pair"]: row for row in rows}
        marks: dict[str, dict[str, list[tuple[str, float]]]] = defaultdict(lambda: defaultdict(list))
        ties = Counter(dict.fromkeys(_HEADS, 0))
        lines = []
        for identifier, example in sorted(examples.items()):
            line: dict[str, Any] = {"identifier": identifier, "category": example.category}
            for head in _HEADS:
                line[head] = [
                    [of_pair[f"{identifier}#{image}-{text}"][head] for text in range(len(example.texts))]
                    for image in range(example.num_images)
                ]
                right, is_tied = choice_marks(line[head], example.images)
                ties[head] += is_tied
                for score, is_right in right.items():
                    marks[score][head].append((example.category, float(is_right)))
            for score, chance in choice_chance(example.num_images, len(example.texts)).items():
                marks[score]["chance"].append((example.category, chance))
            lines.append(json.dumps(line) + "\n")
        accuracies = {
            score: {scorer: _with_average(accuracy_by_group(values)) for scorer, values in of_scorer.items()}
            for score, of_scorer in marks.items()
        }
        counts = {score: Counter(category for category, _ in of["chance"]) for score, of in marks.items()}
        report = _report(accuracies, counts, ties)
        log.info("choices of %d examples:\n\n%s", len(examples), report)
        content = {"examples": len(examples), "ties": dict(ties)} | accuracies
        files = {
            "predictions.jsonl": "".join(lines),
            "accuracy.json": json.dumps(content, indent=1) + "\n",
            "report.md": report,
        }
        return Results(_metrics(accuracies, ties), files)


def _with_average(accuracies: dict[str, float]) -> dict[str, float]:
    """The categories, then ``overall``, then ``average``, the mean of the categories, each of the same weight."""
    categories = {name: value for name, value in accuracies.items() if name != "overall"}
    average = {"average": sum(categories.values()) / len(categories)} if categories else {}
    return categories | {"overall": accuracies["overall"]} | average


def _metrics(accuracies: dict[str, dict[str, dict[str, float]]], ties: Counter[str]) -> dict[str, float]:
    """By names such as ``itm_accuracy`` and ``itm_accuracy_swap_att``."""
    metrics = {
        f"{head}_{score}" + (f"_{group}" if group != "overall" else ""): value
        for score, of_scorer in accuracies.items()
        for head in _HEADS
        for group, value in of_scorer[head].items()
    }
    return metrics | {f"{head}_ties": count for head, count in ties.items()}


def _report(
    accuracies: dict[str, dict[str, dict[str, float]]], counts: dict[str, Counter[str]], ties: Counter[str]
) -> str:
    """A table with a row for each score and category, next to what a guess scores."""
    lines = ["| score | examples | ITM | ITC | chance |", "| --- | --- | --- | --- | --- |"]
    for score, of_scorer in accuracies.items():
        for group, chance in of_scorer["chance"].items():
            number = counts[score].total() if group in ("overall", "average") else counts[score][group]
            values = " | ".join(f"{value:.4f}" for value in (*(of_scorer[head][group] for head in _HEADS), chance))
            lines.append(f"| {score}, {group} | {number} | {values} |")
    return "\n".join(lines) + f"\n\nExamples with a tie, which counts as wrong: ITM {ties['itm']}, ITC {ties['itc']}.\n"


@dataclass(frozen=True)
class ChooseConfig(FinetuneConfig):
    """All settings of an evaluation of choices."""

    eval_only: bool = True
    """Always true: this task trains nothing."""

    task = Choose

    def quick_errors(self) -> list[str]:
        """Return which settings do not fit together or the shards, or name no weights, one line per error."""
        if not self.eval_only:
            return ["eval_only: false: this task trains nothing; leave it out"]
        return super().quick_errors()


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Evaluate; unimo3/errors.py lists the exit statuses."""
    settings = config.parse(ChooseConfig, argv, "python -m finetune.choose", __doc__ or "")
    from finetune.program import finetune

    finetune(settings, settings.build_task())


if __name__ == "__main__":
    main()
