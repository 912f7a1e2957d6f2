"""Emoji of three artists: pretraining on their captions, and retrieval in small galleries of held-out pictures.

Source: ALBEF, arXiv 2107.07651, sections 3.2 and 4, for scores by matching.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.data_sets import CAPTION_TOKENS, DataSet, Outcome, Stage
from experiments.gate_probe import GateRecorder, forced, forcings
from experiments.pictures import kind_of
from experiments.training import READER, on_cpu
from experiments.variants import RunSettings
from unimo3.data.captioned import CaptionedImages, samples_of_images
from unimo3.data.index import ShardIndex
from unimo3.data.loader import evaluation_batches
from unimo3.data.transforms import ImageTransform
from unimo3.distributed import World
from unimo3.metrics.recall import first_ranks
from unimo3.model.args import ModelArgs
from unimo3.objectives.retrieval import RetrievalLoss
from unimo3.training.evaluation import Unguarded, to_device
from unimo3.training.retrieval.states import Towers

MOST_STATE_BYTES = 8e9  # more than those of the held-out pictures
ARTISTS = ("noto", "emoji_one", "emojify")
"""The kinds of pictures. Clip art is not one: too few of its titles occur in training."""
SPLITS = {"pilot": "val", "run": "test"}


@dataclass(frozen=True)
class PictureSettings(RunSettings):
    """Of the runs on emoji."""

    vocabulary: int = 1000
    """Entries of the tokenizer, which is trained on the training captions."""
    pretraining_steps: int = 1000
    """Optimizer steps of MLM, ITM and ITC together."""
    crop_scale: float = 0.5
    """Least fraction of a training picture's area in a random crop."""
    dropout: float = 0.1
    """Of the text tower and of the fusion encoder."""
    gallery: int = 8
    """Pictures that are ranked for a caption, and whose captions are ranked for each of them."""

    def model(self, variant: str) -> ModelArgs:
        """See `RunSettings`."""
        args = super().model(variant)
        return replace(args, dropout=self.dropout, text=replace(args.text, dropout=self.dropout))

    def validate(self) -> list[str]:
        """See `RunSettings`."""
        crop = f"crop_scale {self.crop_scale!r}: 1 at most is needed"
        return super().validate() or ([crop] if self.crop_scale > 1 else [])


class PictureRetrieval(DataSet):
    """Shards of the folder that `experiments.pictures` makes."""

    name = "pictures"
    primary = "auc"
    title = "emoji retrieval, AUC"

    def __init__(self, work: Path, settings: PictureSettings):
        self.settings: PictureSettings = settings
        self._folder = work.resolve() / f"emoji_{settings.vocabulary}"
        self._pictures = work.resolve() / "emoji"

    @property
    def captions(self) -> Path:
        """See `DataSet`."""
        return self._pictures / "dataset_coco.json"

    @property
    def shards(self) -> Path:
        """See `DataSet`."""
        return self._folder

    def digest(self) -> str:
        """See `DataSet`; of the pixels too, which another version of the emoji would change."""
        content = hashlib.sha256(super().digest().encode())
        for shard in sorted(self.shards.rglob("*.tar")):
            content.update(shard.read_bytes())
        return content.hexdigest()[:12]

    def guess(self) -> float:
        """See `DataSet`."""
        return 0.5

    def commands(self) -> list[tuple[Path, list[str]]]:
        """See `DataSet`."""
        source = ["--src", str(self._pictures), "--tokenizer-vocab", str(self.settings.vocabulary)]
        coco = ["pretrain.prepare_shards", "coco", *source, "--out", str(self._folder), "--shard-size", "512"]
        pictures = ["experiments.pictures", str(self._pictures), "--kinds", *ARTISTS]
        return [(self._pictures, pictures), (self._folder, coco)]

    def run(self, variant: str, seed: int, stage: Stage) -> Outcome:
        """See `DataSet`; a pilot measures on ``val``, a run on ``test``."""
        settings, split = self.settings, SPLITS[stage]
        torch.manual_seed(seed)
        transform = ImageTransform(settings.image_size, crop_scale=settings.crop_scale)
        pretrained, metrics, pretraining = self.pretrain(variant, seed, transform)
        contestant = settings.contestant(variant)
        model = contestant.build_retrieval(pretrained, seed)
        task = RetrievalLoss(model, seed)
        metrics |= self._ranking(task, split)
        fusion = model.unimo3.fusion
        costs = {}
        for forcing in forcings(fusion):
            with forced(fusion, forcing):
                costs[forcing] = self._ranking(task, split)[self.primary]
        recorder = self._recorded(model, split)
        training = {"pretraining": pretraining}
        return Outcome(metrics, recorder.means(), recorder.spreads(), costs, model, training)

    @torch.no_grad()
    def _ranking(self, task: RetrievalLoss, split: str) -> dict[str, float]:
        """Recall at 1 and AUC in galleries, which are the same for all variants and seeds."""
        transform = ImageTransform(self.settings.image_size)
        samples = CaptionedImages(ShardIndex(self.shards / split), self.tokenizer(), CAPTION_TOKENS, transform, 0)
        engine = on_cpu(task).eval()
        towers = Towers(engine, samples, World(0, 0, 1), self.settings.batch, READER, MOST_STATE_BYTES, Unguarded())
        embeddings = towers.embed()
        assert embeddings is not None
        (images,), (texts,) = towers.image_blocks(), towers.text_blocks()
        values: dict[str, list[Tensor]] = defaultdict(list)
        for gallery in galleries(self._kinds(samples.index), self.settings.gallery):
            members = torch.isin(embeddings.image_of, gallery).nonzero().flatten()
            is_right = gallery[:, None] == embeddings.image_of[members]
            image, text = gallery.repeat_interleave(len(members)), members.repeat(len(gallery))
            report = task(
                {
                    "text_states": texts.states[text],
                    "image_states": images.states[image],
                    "attention_mask": towers.masks[text],
                }
            )
            similarities = embeddings.images[gallery] @ embeddings.texts[members].T
            for suffix, scores in (("", report["scores"].view_as(is_right)), ("_towers", similarities)):
                for way, queries, right in (("tr", scores, is_right), ("ir", scores.T, is_right.T)):
                    values[f"{way}_at_1{suffix}"].append((first_ranks(queries, right) == 0).double())
                    values[f"{way}_auc{suffix}"].append(aucs(queries, right))
        metrics = {name: torch.cat(of_queries).mean().item() for name, of_queries in values.items()}
        both = {"recall_at_1": "at_1", "auc": "auc", "recall_at_1_towers": "at_1_towers", "auc_towers": "auc_towers"}
        return metrics | {name: (metrics[f"tr_{of}"] + metrics[f"ir_{of}"]) / 2 for name, of in both.items()}

    def _kinds(self, index: ShardIndex) -> list[str]:
        """Of each picture, in the order of the shards."""
        pictures = json.loads(self.captions.read_text())["images"]
        kinds = {picture["cocoid"]: kind_of(picture["filename"]) for picture in pictures}
        return [kinds[int(index.key(*image[0]))] for images in samples_of_images(index) for image in images]

    @torch.no_grad()
    def _recorded(self, model: Any, split: str) -> GateRecorder:
        """Of the pictures with one of their captions each."""
        recorder = GateRecorder(model.unimo3.fusion)
        pairs = self.pairs(split, 0, ImageTransform(self.settings.image_size), masked=0.0)
        model.eval()
        with recorder.recording():
            for loaded, counts in evaluation_batches(pairs, 0, 1, self.settings.batch, READER):
                batch = to_device(loaded, torch.device("cpu"))
                model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
                recorder.add(["pairs" if counted else None for counted in counts.tolist()], batch["attention_mask"])
        return recorder


def galleries(kinds: Sequence[str], size: int) -> list[Tensor]:
    """Random numbers of pictures [size], each gallery of one kind, since styles are easily recognized.

    Pictures that do not fill a gallery are in none.
    """
    generator = torch.Generator().manual_seed(0)
    chosen: list[Tensor] = []
    for kind in sorted({*kinds}):
        members = torch.tensor([number for number, name in enumerate(kinds) if name == kind])
        order = members[torch.randperm(len(members), generator=generator)]
        chosen += order[: len(order) // size * size].split(size)
    return chosen


def aucs(scores: Tensor, is_right: Tensor) -> Tensor:
    """Fraction of each query's pairs of a right and a wrong candidate in which the right one scores higher.

    Args:
        scores: [Q, C].
        is_right: [Q, C].

    Returns:
        [Q] in float64; chance is 0.5.
    """
    wins = scores[:, :, None] > scores[:, None, :]
    pairs = is_right[:, :, None] & ~is_right[:, None, :]
    return (wins & pairs).sum((1, 2)).double() / pairs.sum((1, 2))
