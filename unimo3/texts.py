"""The one rule for how a text is read: in training, in conversion, in prediction and in the exported processor.

Source: the Unicode Standard, section 4.5, for the categories, and section 23.8 for byte order marks.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Separators, control and format characters; none of them is visible.
_INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf")
_AROUND = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\ufeff"

# Of a tokenizer; its folder may set them, too.
_CALL_ARGUMENTS = (
    "add_special_tokens",
    "padding",
    "truncation",
    "max_length",
    "stride",
    "is_split_into_words",
    "pad_to_multiple_of",
    "return_tensors",
    "return_token_type_ids",
    "return_attention_mask",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_offsets_mapping",
    "return_length",
)


def plain(text: str) -> str:
    """A text without white space and byte order marks around it; half a surrogate pair becomes "?"."""
    return text.encode("utf-8", "replace").decode().strip(_AROUND)


def is_blank(text: str) -> bool:
    """Whether a text has no visible character, such as one of zero-width spaces alone."""
    return all(unicodedata.category(character) in _INVISIBLE for character in plain(text))


def read_texts_as_in_training(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a tokenizer read texts as training does, whatever else its folder sets.

    A text is padded and cut on its right side. Its mask is made. Special tokens in it are one token each.
    ``model_max_length`` is the only length.
    """
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.split_special_tokens = False
    # A processor takes what is set here for arguments of its call.
    for name in _CALL_ARGUMENTS:
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    tokenizer.init_kwargs["split_special_tokens"] = False
    # BPE-dropout would encode one text in many ways.
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None) is not None:
        tokenizer.backend_tokenizer.model.dropout = None
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
