"""Statements about one image or two, with the class that each is of: SNLI-VE and NLVR2.

Source: SNLI-VE, arXiv 1901.06706; NLVR2, arXiv 1811.00491.
"""

from typing import Any

import numpy as np

from unimo3.data.order import Unit
from unimo3.data.sample_texts import BadSampleError
from unimo3.data.samples import Inputs, ItemUnits, SampleUnits, image_of, read_sample, sample_rng
from unimo3.metrics.nlvr2 import sentence_of
from unimo3.texts import is_blank

ENTAILMENT_LABELS = ("entailment", "neutral", "contradiction")
TRUTH_LABELS = ("False", "True")
_NUM_IMAGES = 2


class EntailmentSamples(ItemUnits):
    """Hypotheses about a photo; the label is a number of `ENTAILMENT_LABELS`."""

    kind = "hypotheses"

    def build(self, unit: Unit) -> Inputs:
        """The image by a call, hypothesis, ``label`` [] and ``pair_id``."""
        members, item, hypothesis = self._read_item(unit)
        try:
            label = ENTAILMENT_LABELS.index(hypothesis["label"])
            text, pair_id = _text(hypothesis, "text"), _text(hypothesis, "pair_id")
        except (KeyError, TypeError, ValueError) as error:
            raise BadSampleError(
                f"hypothesis {item} of its json lacks a field, or has a label other than "
                f"{', '.join(ENTAILMENT_LABELS)} ({error!r})"
            ) from error
        ids, mask = self._encode(text)
        rng = sample_rng(self._seed, "augment", unit.epoch, unit)
        return {
            "images": image_of(members, self._transform, rng),
            "input_ids": ids,
            "attention_mask": mask,
            "label": np.asarray(label),
            "pair_id": pair_id,
        }


class ImagePairSamples(SampleUnits):
    """Statements about two images; the label is a number of `TRUTH_LABELS`."""

    def build(self, unit: Unit) -> Inputs:
        """Both images by a call, [2, S, S, 3], statement, ``label`` [] and ``identifier``."""
        members, content = read_sample(self.index, unit.shard, unit.unit)
        try:
            text, identifier = _text(content, "statement"), _text(content, "identifier")
            sentence_of(identifier)  # scoring needs its form
            label = content["label"]
            if not isinstance(label, bool):
                raise TypeError(f"label is {label!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise BadSampleError(
                f"its json lacks a field, or has a label that is not true or false ({error!r})"
            ) from error
        ids, mask = self._encode(text)
        rng = sample_rng(self._seed, "augment", unit.epoch, unit)
        images = [image_of(members, self._transform, rng, number) for number in range(_NUM_IMAGES)]
        return {
            "images": lambda: np.stack([decode() for decode in images]),
            "input_ids": ids,
            "attention_mask": mask,
            "label": np.asarray(int(label)),
            "identifier": identifier,
        }


def _text(content: dict[str, Any], name: str) -> str:
    """A field's text.

    Raises:
        KeyError, TypeError, ValueError: there is none.
    """
    text = content[name]
    if not isinstance(text, str):
        raise TypeError(f"{name} is {text!r}")
    if is_blank(text):
        raise ValueError(f"{name} is empty")
    return text
