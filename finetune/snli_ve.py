"""Fine-tuning for SNLI-VE, whether a photo entails a hypothesis: exported weights -> accuracy per class, and labels.

Started once a rank; starting it again resumes. The result is RUN/predictions.jsonl and RUN/accuracy.json.

Source: METER, arXiv 2111.02387, for the settings. SNLI-VE has no evaluation server; a line of the file has ``pairID``
and ``gold_label`` under the names of its release, https://github.com/necla-ml/SNLI-VE.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.args import FinetuneConfig
from finetune.task import InputSettings, Results, Row, RowTask
from unimo3 import config
from unimo3.data.index import ShardIndex
from unimo3.data.statements import ENTAILMENT_LABELS, EntailmentSamples
from unimo3.errors import exit_with_status
from unimo3.inference.predictors import ClassPredictor
from unimo3.metrics.groups import accuracy_by_group

if TYPE_CHECKING:
    from torch import Tensor

    from unimo3.model.config import Unimo3Config
    from unimo3.model.downstream import Unimo3ForImageTextClassification
    from unimo3.objectives.classification import ClassificationLoss


class SnliVe(RowTask):
    """Hypotheses about photos: entailed, contradicted, or neither."""

    kind = "hypotheses"
    unit = "hypothesis"
    id_field = "pair_id"
    has_unique_ids = False  # no server reads the file, and the release promises nothing
    architecture = "Unimo3ForImageTextClassification"
    predictor = ClassPredictor
    fresh = r"^entailment_head\."
    best_metric = "accuracy_overall"

    def configure(self, config: "Unimo3Config") -> None:
        """Three classes."""
        config.id2label = dict(enumerate(ENTAILMENT_LABELS))
        config.label2id = {label: number for number, label in enumerate(ENTAILMENT_LABELS)}

    def samples(self, index: ShardIndex, input_settings: InputSettings) -> EntailmentSamples:
        """Hypotheses with their photo."""
        return EntailmentSamples(index, *input_settings)

    def blank_labels(self, num_rows: int) -> "dict[str, Tensor]":
        """Numbers of classes."""
        import torch

        return {"label": torch.empty(num_rows, dtype=torch.long, device="meta")}

    def objective(self, model: "Unimo3ForImageTextClassification") -> "ClassificationLoss":
        """Cross-entropy."""
        from unimo3.objectives.classification import ClassificationLoss

        return ClassificationLoss(model)

    def score(self, report: "dict[str, Tensor]", loaded: dict[str, Any]) -> list[Row]:
        """The likeliest label, and the true one."""
        best = report["logits"].argmax(dim=-1).tolist()
        return [
            {"pair_id": pair_id, "label": ENTAILMENT_LABELS[number], "gold": ENTAILMENT_LABELS[label]}
            for pair_id, number, label in zip(loaded["pair_id"], best, loaded["label"].tolist(), strict=True)
        ]

    def results(self, rows: list[Row]) -> Results:
        """Accuracy over all and of each true class, and the labels."""
        accuracies = accuracy_by_group((row["gold"], float(row["label"] == row["gold"])) for row in rows)
        lines = sorted(json.dumps({"pairID": row["pair_id"], "gold_label": row["label"]}) + "\n" for row in rows)
        files = {"predictions.jsonl": "".join(lines), "accuracy.json": json.dumps(accuracies, indent=1) + "\n"}
        return Results({f"accuracy_{group}": accuracy for group, accuracy in accuracies.items()}, files)


@dataclass(frozen=True)
class SnliVeConfig(FinetuneConfig):
    """All settings of an SNLI-VE fine-tuning run."""

    task = SnliVe


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Train until done, interrupted or in error; unimo3/errors.py lists the exit statuses."""
    settings = config.parse(SnliVeConfig, argv, "python -m finetune.snli_ve", __doc__ or "")
    from finetune.program import finetune

    finetune(settings, settings.build_task())


if __name__ == "__main__":
    main()
