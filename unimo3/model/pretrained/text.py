"""Weights for the text tower: a Hugging Face folder of a RoBERTa, an XLM-RoBERTa or a ModernBERT.

Source: transformers' modeling_roberta.py, modeling_xlm_roberta.py and modeling_modernbert.py for the names.
"""

from pathlib import Path
from typing import get_args

import torch
from torch import nn

from unimo3.errors import CheckpointError, ConfigError
from unimo3.model.config import TextConfig
from unimo3.model.pretrained.fill import (
    NamedTensors,
    Rename,
    fill,
    read_config,
    read_shapes,
    read_tensors,
    without_values,
)
from unimo3.model.text import build_text_tower

# transformers writes a prefix where the encoder is saved with a head: RoBERTas "roberta", ModernBERT "model".
_PREFIX = r"^(?:roberta|model)\."
_UNUSED = (
    r"^(roberta\.)?(pooler\.|embeddings\.(position_ids|token_type_ids)$)|^lm_head\."  # of RoBERTas
    r"|^(head|decoder)\."  # of a ModernBERT
)


def read_text_config(folder: str) -> TextConfig:
    """Read the configuration of a text encoder's folder.

    Raises:
        ConfigError: the folder is missing or contains a model of another family.
    """
    config = read_config("model.text.init", folder, "RoBERTa")
    if not isinstance(config, TextConfig):
        families = ", ".join(kind.model_type for kind in get_args(TextConfig))
        raise ConfigError(
            f"model.text.init: '{folder}': contains a '{config.model_type}' model; one of {families} is needed"
        )
    return config


def text_weight_errors(folder: str, config: TextConfig) -> list[str]:
    """Return why a folder's weights do not fit a text tower of that configuration, by the files' headers alone."""
    try:
        with torch.device("meta"):
            tower = build_text_tower(config)
        _fill(tower, folder, without_values(read_shapes(Path(folder))))
    except CheckpointError as error:
        return [str(error)]
    return []


def load_text(tower: nn.Module, folder: str) -> None:
    """Fill the text tower from its family's folder (``model.safetensors``, one file or several).

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    _fill(tower, folder, read_tensors(Path(folder)))


def _fill(tower: nn.Module, folder: str, tensors: NamedTensors) -> None:
    fill(tower, tensors, f"model.text.init: '{folder}'", [Rename(_PREFIX, "")], _UNUSED)
