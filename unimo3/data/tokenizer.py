"""Tokenizers: a RoBERTa folder, or a byte-level BPE of the same form trained on a data set's captions.

Source: the tokenizers library's byte-level BPE; RoBERTa, arXiv 1907.11692, for special tokens and their ids.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from unimo3.errors import ConfigError
from unimo3.object_store import StoreError, is_store
from unimo3.small_files import fetch_small_files
from unimo3.texts import read_texts_as_in_training

if TYPE_CHECKING:
    # Imported where a tokenizer is made or read: a conversion without one starts in half the time.
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# A word that no vocabulary has as an entry.
_RARE = "\U0001f9ff\u0d4e\ua66e"


def train_tokenizer(captions: Iterable[str], vocab_size: int, folder: Path) -> int:
    """Train a byte-level BPE and save it as a Hugging Face folder; return its number of entries.

    Every word is preceded by a space, so that it has the same id at a text's start as in its middle. Single bytes are
    always entries, so any text can be written.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, lstrip=token == "<mask>") for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    begin, end = SPECIAL_TOKENS.index("<s>"), SPECIAL_TOKENS.index("</s>")
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", end), ("<s>", begin), add_prefix_space=True)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
    )
    wrapped.save_pretrained(folder)
    return len(wrapped)


def folder_errors(folder: str) -> list[str]:
    """Return an error if a tokenizer's folder does not exist."""
    try:
        if folder and _local(folder).is_dir():
            return []
    except StoreError as error:
        return [f"data.tokenizer: {error}"]
    return [
        f"data.tokenizer: '{folder}': no such folder; in fine-tuning name the exported folder that init names, in "
        "pretraining a RoBERTa folder, or train one with python -m pretrain.prepare_shards coco --tokenizer-vocab N"
    ]


def _local(folder: str) -> Path:
    """A tokenizer's folder on this machine: of a URL in an object store, a copy."""
    return fetch_small_files(folder.rstrip("/")) if is_store(folder) else Path(folder)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer folder. Texts are padded and cut on their right side, whatever the folder has.

    Raises:
        ConfigError: there is none, it has no mask, padding or class token, or two of them are one, two entries have one
            id, or texts are not enclosed by its special tokens or cannot be encoded.
    """
    if errors := folder_errors(folder):
        raise ConfigError(errors)
    local = str(_local(folder))
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    # It would warn of an exported folder's model, which it does not know.
    logging.set_verbosity_error()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(local, trust_remote_code=False)
    except Exception as error:  # transformers raises of many kinds for a file it cannot use
        raise ConfigError(
            f"data.tokenizer: '{folder}': contains no tokenizer that transformers can read "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"data.tokenizer: '{folder}': {type(tokenizer).__name__} is not one of the tokenizers library; a folder "
            "with tokenizer.json, or RoBERTa's vocab.json and merges.txt, is needed"
        )
    read_texts_as_in_training(tokenizer)
    needed = ("cls_token", "sep_token", "pad_token", "mask_token")
    missing = [name for name in needed if getattr(tokenizer, f"{name}_id") is None]
    if missing:
        raise ConfigError(f"data.tokenizer: '{folder}': has no {', '.join(missing)}; a RoBERTa-like one is needed")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ConfigError(
            f"data.tokenizer: '{folder}': has model_max_length {tokenizer.model_max_length!r}; a number, or none, is "
            "needed in its tokenizer_config.json"
        )
    vocabulary = tokenizer.get_vocab()
    repeated, count = Counter(vocabulary.values()).most_common(1)[0]
    if count > 1:
        entries = sorted(entry for entry, number in vocabulary.items() if number == repeated)
        raise ConfigError(
            f"data.tokenizer: '{folder}': its entries {entries[0]!r} and {entries[1]!r} have the id {repeated}; each "
            "needs its own: copy the folder again"
        )
    # The begin and end tokens are not compared: nothing reads them, and RoBERTa's are its class token and separator.
    for one, other in itertools.combinations((*needed, "unk_token"), 2):
        if getattr(tokenizer, f"{one}_id") == getattr(tokenizer, f"{other}_id"):
            raise ConfigError(
                f"data.tokenizer: '{folder}': its {one} and its {other} are both {getattr(tokenizer, one)!r}; padding, "
                "masks, unknown words and the ends of a text are distinguished by their ids: give each an entry of its "
                "own, as RoBERTa's have"
            )
    try:
        ids = tokenizer.backend_tokenizer.encode(_RARE).ids
        called = tokenizer([_RARE])["input_ids"][0]  # as after training
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise ConfigError(
            f"data.tokenizer: '{folder}': cannot encode a text with rare characters ({error}); give it an entry for "
            "unknown words, or use a byte-level tokenizer such as RoBERTa's"
        ) from error
    if called != ids:
        raise ConfigError(
            f"data.tokenizer: '{folder}': {type(tokenizer).__name__} encodes a text in another way than its "
            "tokenizer.json; use one of RoBERTa's class, or PreTrainedTokenizerFast"
        )
    if ids[:1] + ids[-1:] != [tokenizer.cls_token_id, tokenizer.sep_token_id]:
        raise ConfigError(
            f"data.tokenizer: '{folder}': does not put {tokenizer.cls_token!r} before a text and "
            f"{tokenizer.sep_token!r} behind it; its tokenizer.json needs a post_processor, as RoBERTa's has"
        )
    return tokenizer
