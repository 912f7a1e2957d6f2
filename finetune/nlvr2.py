"""Fine-tuning for NLVR2, whether a statement is true of two images: exported weights -> accuracy, consistency, labels.

Started once a rank; starting it again resumes. The result is RUN/predictions.csv, as NLVR2's evaluation program reads
it, and RUN/accuracy.json.

Source: METER, arXiv 2111.02387, for the settings; nlvr2/eval/metrics.py of https://github.com/lil-lab/nlvr for the
format: a line ``identifier,label`` an example, the label True or False, no header.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.args import FinetuneConfig
from finetune.task import InputSettings, Results, Row, RowTask
from unimo3 import config
from unimo3.data.index import ShardIndex
from unimo3.data.statements import TRUTH_LABELS, ImagePairSamples
from unimo3.errors import exit_with_status
from unimo3.inference.predictors import ClassPredictor
from unimo3.metrics.nlvr2 import pair_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from unimo3.model.config import Unimo3Config
    from unimo3.model.downstream import Unimo3ForImagesAndTextClassification
    from unimo3.objectives.classification import ClassificationLoss


class Nlvr2(RowTask):
    """Statements about two images, true or false."""

    kind = "statement"
    unit = "statement"
    id_field = "identifier"
    num_images = 2
    architecture = "Unimo3ForImagesAndTextClassification"
    predictor = ClassPredictor
    fresh = r"^(pair_head|image_shift)\."
    best_metric = "accuracy"

    def configure(self, config: "Unimo3Config") -> None:
        """Two classes, false and true."""
        config.id2label = dict(enumerate(TRUTH_LABELS))
        config.label2id = {label: number for number, label in enumerate(TRUTH_LABELS)}

    def samples(self, index: ShardIndex, input_settings: InputSettings) -> ImagePairSamples:
        """Statements with their two images."""
        return ImagePairSamples(index, *input_settings)

    def blank_labels(self, num_rows: int) -> "dict[str, Tensor]":
        """Numbers of classes."""
        import torch

        return {"label": torch.empty(num_rows, dtype=torch.long, device="meta")}

    def objective(self, model: "Unimo3ForImagesAndTextClassification") -> "ClassificationLoss":
        """Cross-entropy."""
        from unimo3.objectives.classification import ClassificationLoss

        return ClassificationLoss(model)

    def score(self, report: "dict[str, Tensor]", loaded: dict[str, Any]) -> list[Row]:
        """The likelier label, and whether it is right."""
        best = report["logits"].argmax(dim=-1).tolist()
        return [
            {"identifier": identifier, "label": TRUTH_LABELS[number], "is_right": number == label}
            for identifier, number, label in zip(loaded["identifier"], best, loaded["label"].tolist(), strict=True)
        ]

    def results(self, rows: list[Row]) -> Results:
        """The official metrics and the file that the official program reads."""
        metrics = pair_metrics((row["identifier"], row["is_right"]) for row in rows)
        lines = sorted(f"{row['identifier']},{row['label']}\n" for row in rows)
        return Results(
            metrics, {"predictions.csv": "".join(lines), "accuracy.json": json.dumps(metrics, indent=1) + "\n"}
        )


@dataclass(frozen=True)
class Nlvr2Config(FinetuneConfig):
    """All settings of an NLVR2 fine-tuning run."""

    task = Nlvr2


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Train until done, interrupted or in error; unimo3/errors.py lists the exit statuses."""
    settings = config.parse(Nlvr2Config, argv, "python -m finetune.nlvr2", __doc__ or "")
    from finetune.program import finetune

    finetune(settings, settings.build_task())


if __name__ == "__main__":
    main()
