"""The model with a downstream task's head: question answering, NLVR2, visual entailment, retrieval.

Each loads a pretraining export's weights directly: heads that the task lacks are skipped, the task's head starts fresh.

Source: METER, arXiv 2111.02387, for the classifiers and NLVR2's two passes; ALBEF, arXiv 2107.07651, for retrieval by
contrast and matching.
"""

# Shapes: B batch, T text tokens, S pixels a side, D fusion width.

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoModelForVisualQuestionAnswering
from transformers.utils import ModelOutput

from unimo3.errors import ConfigError
from unimo3.model.args import PRETRAINING_HEADS
from unimo3.model.config import Unimo3Config
from unimo3.model.heads import ClassifierHead, ItcHead, ItcOutput, ItmHead, SecondImageShift
from unimo3.model.unimo3 import Unimo3Model, Unimo3PreTrainedModel


@dataclass
class Unimo3ClassifierOutput(ModelOutput):
    """Scores of a task's classes.

    Attributes:
        loss: if labels were given.
        logits: [B, classes].
        text_gates, image_gates: on request, see `Unimo3ModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    text_gates: tuple[Tensor | None, ...] | None = None
    image_gates: tuple[Tensor | None, ...] | None = None


@dataclass
class Unimo3RetrievalOutput(ModelOutput):
    """How well texts and images fit.

    Attributes:
        loss: cross-entropy of `logits`, if labels were given.
        logits: [B, 2], whether a text and its image match: (no, yes).
        logits_per_image: [B, B], every image with every text by the towers alone, over the temperature.
        text_embeds: [B, itc_size], unit vectors.
        image_embeds: the same.
        text_gates, image_gates: on request, see `Unimo3ModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    logits_per_image: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_gates: tuple[Tensor | None, ...] | None = None
    image_gates: tuple[Tensor | None, ...] | None = None


class Unimo3ForVisualQuestionAnswering(Unimo3PreTrainedModel):
    """The model with a classifier over an answer vocabulary of `num_answers`."""

    _keys_to_ignore_on_load_unexpected = [PRETRAINING_HEADS]

    def __init__(self, config: Unimo3Config):
        super().__init__(config)
        if config.num_answers < 1:
            raise ConfigError(f"num_answers: {config.num_answers}: at least one answer is needed to build this head")
        self.unimo3 = Unimo3Model(config)
        self.vqa_head = ClassifierHead(config, 2 * config.hidden_size, config.num_answers)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_gates: bool = False,
    ) -> Unimo3ClassifierOutput:
        """Score every answer to questions [B, T] about images [B, 3, S, S].

        Args:
            labels: soft scores in [0, 1] of every answer, [B, answers]; the loss is the binary cross-entropy, summed
                over answers.
        """
        fused = self.unimo3(input_ids, pixel_values, attention_mask, output_gates)
        logits = self.vqa_head(fused.pooler_output)
        loss = None
        if labels is not None:
            loss = binary_cross_entropy_with_logits(logits.float(), labels) * labels.shape[-1]
        return Unimo3ClassifierOutput(loss, logits, fused.text_gates, fused.image_gates)


class Unimo3ForImageTextClassification(Unimo3PreTrainedModel):
    """The model with a classifier of image-text pairs into `num_labels` classes, as SNLI-VE asks for (three)."""

    _keys_to_ignore_on_load_unexpected = [PRETRAINING_HEADS]

    def __init__(self, config: Unimo3Config):
        super().__init__(config)
        self.unimo3 = Unimo3Model(config)
        self.entailment_head = ClassifierHead(config, 2 * config.hidden_size, _num_labels(config))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_gates: bool = False,
    ) -> Unimo3ClassifierOutput:
        """Score the classes of texts [B, T] with images [B, 3, S, S]; labels [B] are class numbers."""
        fused = self.unimo3(input_ids, pixel_values, attention_mask, output_gates)
        logits = self.entailment_head(fused.pooler_output)
        loss = None if labels is None else cross_entropy(logits.float(), labels)
        return Unimo3ClassifierOutput(loss, logits, fused.text_gates, fused.image_gates)


class Unimo3ForImagesAndTextClassification(Unimo3PreTrainedModel):
    """The model with a classifier of a text about two images into `num_labels` classes, as NLVR2 asks for (two).

    The text is fused with each image apart; the second image's modality embedding is shifted by a learned vector that
    starts at zero, so that the head can distinguish first and second image.
    """

    _keys_to_ignore_on_load_unexpected = [PRETRAINING_HEADS]

    def __init__(self, config: Unimo3Config):
        super().__init__(config)
        self.unimo3 = Unimo3Model(config)
        self.image_shift = SecondImageShift(config)
        self.pair_head = ClassifierHead(config, 4 * config.hidden_size, _num_labels(config))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_gates: bool = False,
    ) -> Unimo3ClassifierOutput:
        """Score the classes of texts [B, T] about pairs of images [B, 2, 3, S, S]; labels [B] are class numbers.

        Gates are those of [first images; second images], 2 B rows.

        Raises:
            ValueError: `pixel_values` has another shape.
        """
        if pixel_values.dim() != 5 or pixel_values.shape[1] != 2:
            raise ValueError(f"pixel_values: shape {tuple(pixel_values.shape)}; two images a text, [B, 2, 3, S, S]")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        text = self.unimo3.encode_text(input_ids, attention_mask)
        images = self.unimo3.encode_image(pixel_values.transpose(0, 1).flatten(0, 1))
        shifts = self.image_shift(len(input_ids))
        fused = self.unimo3.fuse(torch.cat([text, text]), images, attention_mask.repeat(2, 1), shifts)
        first, second = self.unimo3.pool(fused).chunk(2)
        logits = self.pair_head(torch.cat([first, second], dim=-1))
        loss = None if labels is None else cross_entropy(logits.float(), labels)
        if not output_gates:
            return Unimo3ClassifierOutput(loss, logits)
        return Unimo3ClassifierOutput(loss, logits, fused.text_gates, fused.image_gates)


class Unimo3ForImageAndTextRetrieval(Unimo3PreTrainedModel):
    """The model with pretraining's matching and contrastive heads: a shortlist by the towers, its order by fusion."""

    _keys_to_ignore_on_load_unexpected = [r"^mlm_head\."]

    def __init__(self, config: Unimo3Config):
        super().__init__(config)
        self.unimo3 = Unimo3Model(config)
        self.itm_head = ItmHead(config)
        self.itc_head = ItcHead(config, self.unimo3.vision_tower.width)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_gates: bool = False,
    ) -> Unimo3RetrievalOutput:
        """Match texts [B, T] with images [B, 3, S, S] row by row; labels [B] are 1 where they belong together."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        text = self.unimo3.encode_text(input_ids, attention_mask)
        image = self.unimo3.encode_image(pixel_values)
        fused = self.unimo3.fuse(text, image, attention_mask)
        logits = self.itm_head(self.unimo3.pool(fused))
        contrast: ItcOutput = self.itc_head(text, image)
        return Unimo3RetrievalOutput(
            loss=None if labels is None else cross_entropy(logits.float(), labels),
            logits=logits,
            logits_per_image=contrast.image @ contrast.text.T / contrast.temperature,
            text_embeds=contrast.text,
            image_embeds=contrast.image,
            text_gates=fused.text_gates if output_gates else None,
            image_gates=fused.image_gates if output_gates else None,
        )


def _num_labels(config: Unimo3Config) -> int:
    if not config.num_labels:
        raise ConfigError(f"num_labels: {config.num_labels}: at least one class is needed to build this head")
    return config.num_labels


AutoModelForVisualQuestionAnswering.register(Unimo3Config, Unimo3ForVisualQuestionAnswering)
