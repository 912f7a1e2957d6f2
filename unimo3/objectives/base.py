"""What an objective is, and the pretraining task that runs several of them on one pass through the towers.

The image tower runs once a step and the text tower once on [plain; masked]; all objectives that need fused states
share one call of the fusion encoder, all that need similarities one call of the contrastive head. The total is the
weighted sum of the losses.

Source: METER, arXiv 2111.02387 (MLM, ITM); ALBEF, arXiv 2107.07651 (ITC).
"""

# Shapes: B batch, P pairs to be fused, n states of a tower, T text tokens, V image tokens, W tower width.

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unimo3.distributed import gather_rows
from unimo3.model.fusion import FusionOutput, mean_gates
from unimo3.model.heads import ItcOutput
from unimo3.objectives.by_source import sums_by_source
from unimo3.objectives.similarity import ContrastedModel, Similarities, compare
from unimo3.objectives.step_contrast import Generators, StepContrast, contrast_step

Losses = dict[str, Tensor]
Gates = Sequence[Tensor | None]

# Keys that `PretrainingLoss.prepare_step` adds to a batch.
_FEATURES_ALONE = "features_alone"
_STEP_CONTRAST = "step_contrast"


class TowerStates(NamedTuple):
    """A micro-batch, its tower states, text [B, n, T, W] and image [B, n, V, W], and what is made of them.

    Similarities and features are None if unused.
    """

    batch: dict[str, Any]
    plain_text: Tensor | None
    masked_text: Tensor | None
    image: Tensor
    similarities: Similarities | None
    features: ItcOutput | None = None

    @property
    def step_contrast(self) -> StepContrast | None:
        """What a first pass over the complete step has left for this micro-batch; None without such a pass."""
        return self.batch.get(_STEP_CONTRAST)


class FusionInput(NamedTuple):
    """Tower states to be fused, text [P, n, T, W] with its mask [P, T] and image [P, n, V, W], and labels [P]."""

    text: Tensor
    image: Tensor
    mask: Tensor
    labels: Tensor | None = None


class FusedPairs(NamedTuple):
    """An objective's pairs, and what the fusion encoder made of them."""

    input: FusionInput
    output: FusionOutput


class Objective(ABC):
    """One pretraining loss. `name` is its key in the configuration and in the metrics.

    With `reports_rows`, its losses have ``rows`` as well, [B, 2] without gradient: for each of this rank's rows the sum
    of its losses and their number.
    """

    name: str
    reads_plain_text: bool
    reads_masked_text: bool
    reads_similarities: bool = False
    needs_other_images: bool = False
    reports_rows: bool = False

    def __init__(self, weight: float):
        self.weight = weight

    @abstractmethod
    def fusion_input(self, states: TowerStates) -> FusionInput | None:
        """The pairs this objective wants fused, or None if it needs no fused states."""

    @abstractmethod
    def losses(self, model: ContrastedModel, states: TowerStates, fused: FusedPairs | None) -> Losses:
        """A ``loss`` with gradient and any further metrics, unweighted; `fused` has the pairs of `fusion_input`.

        A metric must have the same name on every rank: the all-reduce concatenates scalars in the order of their names.
        A value with more than one element is taken for a gate map.
        """


def gate_report(text_gates: Gates, image_gates: Gates, mask: Tensor) -> Losses:
    """``gates_text`` and ``gates_image``, see `mean_gates`, where the model has gates.

    Args:
        mask: [B, T] of the texts.
    """
    means = {"gates_text": mean_gates(text_gates, mask), "gates_image": mean_gates(image_gates, None)}
    return {name: mean for name, mean in means.items() if mean is not None}


class PretrainingLoss(nn.Module):
    """Batch -> losses of all objectives whose weight is not zero.

    Args:
        sources: names of the training data's sources; of several, the losses of each are reported while training.
    """

    def __init__(self, model: ContrastedModel, objectives: Sequence[Objective], sources: Sequence[str] = ()):
        super().__init__()
        self.model = model
        self.sources = sources
        self.objectives = [objective for objective in objectives if objective.weight != 0]
        assert self.objectives, "the configuration check refuses a run without any objective"

    def forward(self, batch: dict[str, Any]) -> Losses:
        """Compute every loss.

        Args:
            batch: ``pixel_values`` [B, 3, S, S], ``input_ids``, ``attention_mask``, ``mlm_input_ids`` and
                ``mlm_labels`` [B, T], ``image_id`` and ``positions`` [B]; with several sources, ``source`` [B].

        Returns:
            ``loss``, the weighted sum, each objective's own metrics under its name, where an objective needs other
            images ``single_image_ratio``, 1 if all pairs of all ranks have one image id and else 0, and, where the
            model has gates, ``gates_text`` and ``gates_image`` of this rank's first fused pairs: see `mean_gates`. For
            `prepare_step`, the fields of an `ItcOutput`.
        """
        for objective in self.objectives:
            objective.reports_rows = self.training and len(self.sources) > 1
        states = self._encode(batch)
        if _FEATURES_ALONE in batch:
            assert states.features is not None, "contrast reads features"
            return states.features._asdict()
        if states.features is not None:
            states = states._replace(similarities=compare(states.features, batch["image_id"]))
        requests = [objective.fusion_input(states) for objective in self.objectives]
        wanted = [request for request in requests if request is not None]
        fused = self._fuse(wanted)
        report = gate_report(fused[0].text_gates, fused[0].image_gates, wanted[0].mask) if fused else {}
        total = states.image.new_zeros((), dtype=torch.float32)
        for objective, request in zip(self.objectives, requests, strict=True):
            losses = objective.losses(self.model, states, FusedPairs(request, fused.pop(0)) if request else None)
            total = total + objective.weight * losses["loss"]
            if (rows := losses.pop("rows", None)) is not None:
                report |= sums_by_source(rows, batch["source"], self.sources, f"loss_{objective.name}")
            for key, value in losses.items():
                report[f"{key}_{objective.name}"] = value.detach()
        if any(objective.needs_other_images for objective in self.objectives):
            ids = gather_rows(batch["image_id"])
            report["single_image_ratio"] = (ids == ids[0]).all().float()
        return {"loss": total, **report}

    def prepare_step(
        self, micro_batches: Iterable[dict[str, Any]], run: Callable[[dict[str, Any]], Losses]
    ) -> list[dict[str, Any]]:
        """Contrast the pairs of a complete optimizer step, before its micro-batches are computed one by one.

        The towers run on every micro-batch without gradient. Masked texts run too: the text tower draws dropout for
        plain and masked texts in one call, and both passes must draw the same.

        Args:
            micro_batches: of this rank, as for `forward`.
            run: this module, or the engine around it.

        Returns:
            What each micro-batch gets in addition: with it, the ITC loss is that of the step.
        """
        features, image_ids, generators = [], [], []
        for batch in micro_batches:
            generators.append(Generators.current(batch["attention_mask"].device))
            with torch.no_grad():
                features.append(ItcOutput(**run(batch | {_FEATURES_ALONE: True})))
            image_ids.append(batch["image_id"])
        return [{_STEP_CONTRAST: contrast} for contrast in contrast_step(features, image_ids, generators)]

    def _encode(self, batch: dict[str, Any]) -> TowerStates:
        ids = []
        plain = any(objective.reads_plain_text for objective in self.objectives)
        masked = any(objective.reads_masked_text for objective in self.objectives)
        if plain:
            ids.append(batch["input_ids"])
        if masked:
            ids.append(batch["mlm_input_ids"])
        mask = batch["attention_mask"]
        contrast = batch.get(_STEP_CONTRAST)
        with contrast.generators.restored(mask.device) if contrast else nullcontext():
            text = self.model.unimo3.encode_text(torch.cat(ids), mask.repeat(len(ids), 1))
            image = self.model.unimo3.encode_image(batch["pixel_values"])
        parts = list(text.chunk(len(ids)))
        plain_text, masked_text = parts.pop(0) if plain else None, parts.pop(0) if masked else None
        features = None
        if any(objective.reads_similarities for objective in self.objectives):
            assert plain_text is not None, "what reads similarities reads plain text"
            features = self.model.itc_head(plain_text, image)
        return TowerStates(batch, plain_text, masked_text, image, None, features)

    def _fuse(self, requests: list[FusionInput]) -> list[FusionOutput]:
        if not requests:
            return []
        fused = self.model.unimo3.fuse(
            torch.cat([request.text for request in requests]),
            torch.cat([request.image for request in requests]),
            torch.cat([request.mask for request in requests]),
        )
        sizes = [len(request.text) for request in requests]

        def of_each_request(gates: tuple[Tensor | None, ...]) -> list[tuple[Tensor | None, ...]]:
            parts = [[None] * len(sizes) if gate is None else gate.split(sizes) for gate in gates]
            return list(zip(*parts, strict=True))

        text_gates, image_gates = of_each_request(fused.text_gates), of_each_request(fused.image_gates)
        parts = zip(fused.text.split(sizes), fused.image.split(sizes), text_gates, image_gates, strict=True)
        return [FusionOutput(*part) for part in parts]
