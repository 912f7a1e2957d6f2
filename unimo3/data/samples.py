"""Indexed bytes -> model inputs, in the reader processes.

Whatever is drawn for a sample (caption, masks, augmentation) is a function of (seed, epoch, sample), so it is the same
at any number of ranks and readers.

Source: METER, arXiv 2111.02387, for the inputs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from unimo3.data.answers import AnswerVocabulary
from unimo3.data.index import ShardIndex
from unimo3.data.masking import Masking
from unimo3.data.members import IMAGE_EXTENSIONS
from unimo3.data.order import Unit
from unimo3.data.sample_texts import BadSampleError, captions_of, content_of
from unimo3.texts import is_blank, plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from unimo3.data.transforms import ImageTransform

Inputs = dict[str, Any]


class Samples(Protocol):
    """Random access to one kind of model input."""

    index: ShardIndex

    @property
    def units_per_shard(self) -> np.ndarray:
        """[shards] units of each shard."""
        ...

    def key(self, unit: Unit) -> str:
        """The key a unit is logged by."""
        ...

    def build(self, unit: Unit) -> Inputs:
        """Inputs of one unit: numpy arrays to be stacked, and plain values to be listed.

        Its ``images`` are still to be decoded: a call gives them, or raises `BadSampleError` as well.

        Raises:
            BadSampleError: the sample cannot be used.
        """
        ...


class TextEncoder:
    """Text -> ids and mask of a fixed length; a longer text keeps its beginning and its </s>."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int):
        from tokenizers import Tokenizer

        # A copy with its lengths set once: the tokenizer's call sets and looks them up again for every text, which
        # takes longer than the text.
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.enable_padding(
            length=max_tokens, pad_id=token_id(tokenizer.pad_token_id), pad_token=str(tokenizer.pad_token)
        )

    def __call__(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """ids and attention mask, [T] int64 each."""
        encoded = self._tokenizer.encode(plain(text))
        return np.asarray(encoded.ids), np.asarray(encoded.attention_mask)


class SampleUnits:
    """Shards of which each sample is a unit of reading, and how their bytes become inputs.

    Args:
        transform: of images.
        seed: of what is drawn for a sample.
    """

    def __init__(
        self,
        index: ShardIndex,
        tokenizer: PreTrainedTokenizerBase,
        max_text_tokens: int,
        transform: ImageTransform,
        seed: int = 0,
    ):
        self.index = index
        self._encode = TextEncoder(tokenizer, max_text_tokens)
        self._transform = transform
        self._seed = seed

    @property
    def units_per_shard(self) -> np.ndarray:
        """One unit a sample."""
        return self.index.samples_per_shard

    def key(self, unit: Unit) -> str:
        """The sample's key."""
        return self.index.key(unit.shard, unit.unit)


class ItemUnits(SampleUnits):
    """Shards of whose samples each item is a unit of reading: a question, a hypothesis.

    Attributes:
        kind: the list of a sample's ``json`` that has the items.
    """

    kind: ClassVar[str]

    @property
    def units_per_shard(self) -> np.ndarray:
        """One unit an item."""
        return self.index.items_per_shard(self.kind)

    def key(self, unit: Unit) -> str:
        """The sample's key and the item's number in it."""
        sample, item = self.index.item(self.kind, unit.shard, unit.unit)
        return f"{self.index.key(unit.shard, sample)}#{item}"

    def _read_item(self, unit: Unit) -> tuple[dict[str, bytes], int, Any]:
        """The members of a unit's sample, the number of the unit's item, and the item.

        Raises:
            BadSampleError: there is no such item.
            DataError: the index counts other items than the sample has.
        """
        sample, number = self.index.item(self.kind, unit.shard, unit.unit)
        members, content = read_sample(self.index, unit.shard, sample)
        items = content.get(self.kind)
        if items is None:  # an index of version 2 counts the items of another kind
            self.index.check_items(self.kind, unit.shard, sample, 0)
        if not isinstance(items, list):
            raise BadSampleError(f"its {self.kind} are a {type(items).__name__}; a list is needed")
        self.index.check_items(self.kind, unit.shard, sample, len(items))
        return members, number, items[number]


class PretrainSamples(SampleUnits):
    """Images with one caption each; an image's captions take turns over the epochs.

    Args:
        mlm_probability: fraction of tokens to predict; 0: there is no masked text.
    """

    def __init__(
        self,
        index: ShardIndex,
        tokenizer: PreTrainedTokenizerBase,
        max_text_tokens: int,
        transform: ImageTransform,
        mlm_probability: float,
        seed: int,
    ):
        super().__init__(index, tokenizer, max_text_tokens, transform, seed)
        self._mlm_probability = mlm_probability
        ids = set(tokenizer.get_vocab().values())
        num_ids = max(ids) + 1
        self._mask = Masking(
            mlm_probability,
            token_id(tokenizer.mask_token_id),
            # With the numbers that no entry has.
            frozenset(tokenizer.all_special_ids) | (set(range(num_ids)) - ids),
            num_ids,
        )

    def build(self, unit: Unit) -> Inputs:
        """The image by a call, plain and masked text, labels."""
        members, content = read_sample(self.index, unit.shard, unit.unit)
        captions = captions_of(members, content)
        if not captions:
            raise BadSampleError("has no caption")
        # Every caption comes before one comes again; which is first is drawn.
        first = _hash(self._seed, unit.source, unit.shard, unit.unit)
        caption = captions[(first + unit.epoch) % len(captions)]
        ids, mask = self._encode(caption)
        inputs: Inputs = {
            "images": image_of(members, self._transform, sample_rng(self._seed, "augment", unit.epoch, unit)),
            "input_ids": ids,
            "attention_mask": mask,
            "image_id": np.asarray(identity_of(content, unit.shard, unit.unit, unit.source)),
        }
        if self._mlm_probability:
            masked, labels = self._mask(ids, sample_rng(self._seed, "mask", unit.epoch, unit))
            inputs |= {"mlm_input_ids": masked, "mlm_labels": labels}
        return inputs


class VqaSamples(ItemUnits):
    """Questions about images, with soft targets over an answer vocabulary.

    Args:
        answers: the vocabulary; the targets of a question without answers are all zero.
    """

    kind = "questions"

    def __init__(
        self,
        index: ShardIndex,
        tokenizer: PreTrainedTokenizerBase,
        max_text_tokens: int,
        transform: ImageTransform,
        answers: AnswerVocabulary,
        seed: int,
    ):
        super().__init__(index, tokenizer, max_text_tokens, transform, seed)
        self._answers = answers

    def build(self, unit: Unit) -> Inputs:
        """The image by a call, question, targets, and what scoring needs."""
        members, item, question = self._read_item(unit)
        try:
            empty = is_blank(question["question"])
        except (KeyError, TypeError, AttributeError) as error:
            raise BadSampleError(f"question {item} of its json lacks a field ({error!r})") from error
        if empty:
            raise BadSampleError(f"question {question.get('question_id', item)} is empty")
        ids, mask = self._encode(question["question"])
        humans = [] if question.get("answers") is None else question["answers"]
        if not isinstance(humans, list) or not all(isinstance(answer, str) for answer in humans):
            raise BadSampleError(f"question {question.get('question_id', item)} has answers that are no list of texts")
        return {
            "images": image_of(members, self._transform, sample_rng(self._seed, "augment", unit.epoch, unit)),
            "input_ids": ids,
            "attention_mask": mask,
            "targets": self._answers.soft_targets(humans),
            "question": question,
        }


def read_sample(index: ShardIndex, shard: int, sample: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """A sample's members by extension, and the content of its ``json``.

    Raises:
        BadSampleError: it has no text that could be read.
    """
    members = index.read(shard, sample)
    return members, content_of(members)


def identity_of(content: dict[str, Any], shard: int, sample: int, source: int = 0) -> int:
    """The image of a sample as a number of 63 bits; two samples of one image are no negatives of each other.

    An ``image_id`` is the same as a number and as a text; each source numbers its own images. Without one (null, an
    empty text, NaN and infinity are none), the identity is where the sample is stored: source, shard and number there.

    Args:
        content: of the sample's ``json``.

    Raises:
        BadSampleError: the ``image_id`` is neither a number nor a text.
    """
    image_id = content.get("image_id")
    if isinstance(image_id, bool) or not isinstance(image_id, int | float | str | None):
        raise BadSampleError(f"its image_id is a {type(image_id).__name__}; a number or a text is needed")
    if isinstance(image_id, float) and image_id.is_integer():
        image_id = int(image_id)  # as programs write it that store missing numbers as NaN
    is_none = image_id is None or (isinstance(image_id, float) and not math.isfinite(image_id))
    text = "" if is_none else str(image_id).strip()
    return _hash("image", source, text) if text else _hash("sample", source, shard, sample)


def image_of(
    members: dict[str, bytes], transform: ImageTransform, rng: np.random.Generator, number: int | None = None
) -> Callable[[], np.ndarray]:
    """A call that decodes a sample's image.

    Args:
        number: of the image, where a sample has several.

    Raises:
        BadSampleError: there is none; or, by the call, it cannot be decoded.
    """
    names = [name if number is None else f"{number}.{name}" for name in IMAGE_EXTENSIONS]
    extension = next((name for name in names if name in members), None)
    if extension is None:
        raise BadSampleError(f"has no image member ({', '.join(names)})")

    def decode() -> np.ndarray:
        try:
            return transform(members[extension], rng)
        except MemoryError:
            raise  # the machine's error, not the sample's
        except Exception as error:  # decoders meet damage with errors of any kind
            raise BadSampleError(f"its image cannot be decoded ({error})") from error

    return decode


def sample_rng(seed: int, purpose: str, epoch: int, unit: Unit) -> np.random.Generator:
    """The generator of a sample's draws for one purpose, the same wherever the sample is read."""
    key = (unit.shard, unit.unit, unit.source) if unit.source else (unit.shard, unit.unit)
    return np.random.default_rng((seed, int.from_bytes(purpose.encode()[:8]), epoch, *key))


def _hash(*values: Any) -> int:
    """A number of 63 bits, the same in every process."""
    text = " ".join(map(str, values))
    # JSON may contain half of a surrogate pair.
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]) >> 1


def token_id(value: Any) -> int:
    """A special token's id, which `load_tokenizer` has checked."""
    assert isinstance(value, int)
    return value
