"""Fine-tuning for image-text retrieval: exported weights -> recall at 1, 5 and 10 both ways.

Started once a rank; starting it again resumes. The result is RUN/recall.json.

Source: ALBEF, arXiv 2107.07651, for contrast, hard-negative matching and the shortlist; METER, arXiv 2111.02387, and
BridgeTower, arXiv 2206.08657, for the settings.
"""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.args import FinetuneConfig
from finetune.task import HeldOut, InputSettings, Results, Task
from unimo3 import config
from unimo3.data.captioned import CaptionedImages, samples_of_images
from unimo3.data.index import ShardIndex
from unimo3.data.samples import PretrainSamples
from unimo3.engine import Engine
from unimo3.errors import DataError, exit_with_status
from unimo3.inference.predictors import MatchPredictor
from unimo3.training.retrieval.args import RankingArgs

if TYPE_CHECKING:
    from torch import Tensor

    from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
    from unimo3.objectives.retrieval import RetrievalLoss
    from unimo3.training.evaluation import Guard


class Retrieval(Task):
    """Texts for an image, and an image for a text.

    Args:
        ranking: how held-out ones are ranked.
        seed: of the run; it draws the negatives.
    """

    kind = "captions"
    unit = "caption"
    architecture = "Unimo3ForImageAndTextRetrieval"
    predictor = MatchPredictor
    contrasts = True
    best_metric = "recall_mean"

    def __init__(self, ranking: RankingArgs, seed: int):
        self._ranking = ranking
        self._seed = seed

    def samples(self, index: ShardIndex, input_settings: InputSettings) -> PretrainSamples:
        """Images with one caption each, as in pretraining, without masks."""
        return PretrainSamples(
            index,
            input_settings.tokenizer,
            input_settings.max_text_tokens,
            input_settings.transform,
            mlm_probability=0.0,
            seed=input_settings.seed,
        )

    def blank_labels(self, num_rows: int) -> "dict[str, Tensor]":
        """Which image a row has, all of them different, and the rows' positions in the sample order."""
        import torch

        return {"image_id": torch.arange(num_rows), "positions": torch.arange(num_rows)}

    def objective(self, model: "Unimo3ForImageAndTextRetrieval") -> "RetrievalLoss":
        """Contrast, and matching with hard negatives."""
        from unimo3.objectives.retrieval import RetrievalLoss

        return RetrievalLoss(model, self._seed)

    def describe(self, engine: Engine, loaded: dict[str, Any]) -> list[str]:
        """See `Task`: whether the text and its image match."""
        import torch

        from unimo3.training.evaluation import to_device

        batch = to_device(dict(loaded), engine.device)
        with torch.no_grad():
            out = engine.module.model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
        return [f"match {match:.3f}" for match in out.logits.float().softmax(dim=-1)[:, 1].tolist()]

    def evaluate(self, engine: Engine, held_out: HeldOut, guard: "Guard") -> Results | None:
        """Recall; see `held_out_recall`."""
        from unimo3.training.retrieval.evaluation import held_out_recall

        input_settings = held_out.input_settings
        samples = CaptionedImages(
            held_out.shards, input_settings.tokenizer, input_settings.max_text_tokens, input_settings.transform
        )
        metrics = held_out_recall(
            engine, samples, held_out.world, held_out.batch, held_out.reader, self._ranking, guard
        )
        if metrics is None:
            return None
        return Results(metrics, {"recall.json": json.dumps(metrics, indent=1) + "\n"})


@dataclass(frozen=True)
class RetrievalConfig(FinetuneConfig):
    """All settings of a retrieval fine-tuning run."""

    ranking: RankingArgs = field(default_factory=RankingArgs)

    task = Retrieval

    def quick_errors(self) -> list[str]:
        """Return which settings do not fit together or the shards, or name no weights, one line per error."""
        errors = super().quick_errors()
        try:
            val = self.data.open_val()
        except DataError:
            return errors  # the data group reports it
        if val is None or self.ranking.fold_images <= 0:
            return errors
        return errors + self.ranking.fold_errors(sum(map(len, samples_of_images(val))))

    def build_task(self) -> Retrieval:
        """The task, with how it ranks."""
        return Retrieval(self.ranking, self.run.seed)


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Train until done, interrupted or in error; unimo3/errors.py lists the exit statuses."""
    settings = config.parse(RetrievalConfig, argv, "python -m finetune.retrieval", __doc__ or "")
    from finetune.program import finetune

    finetune(settings, settings.build_task())


if __name__ == "__main__":
    main()
