"""RoBERTa's weights for the text tower.

Source: transformers' modeling_roberta.py for the names.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import RobertaConfig, RobertaModel

from unimo3.errors import CheckpointError, ConfigError
from unimo3.model.pretrained.fill import (
    NamedTensors,
    Rename,
    fill,
    read_config,
    read_shapes,
    read_tensors,
    without_values,
)

_UNUSED = r"^(roberta\.)?(pooler\.|embeddings\.(position_ids|token_type_ids)$)|^lm_head\."


def read_roberta_config(folder: str) -> RobertaConfig:
    """Read a RoBERTa folder's configuration.

    Raises:
        ConfigError: the folder is missing or contains another model.
    """
    config = read_config("model.text.init", folder, "RoBERTa")
    if not isinstance(config, RobertaConfig):
        raise ConfigError(
            f"model.text.init: '{folder}': contains a '{config.model_type}' model; a RoBERTa one is needed"
        )
    return config


def roberta_errors(folder: str, config: RobertaConfig) -> list[str]:
    """Return why a folder's weights do not fit a text tower of that configuration, by the files' headers alone."""
    try:
        with torch.device("meta"):
            tower = RobertaModel(config, add_pooling_layer=False)
        _fill(tower, folder, without_values(read_shapes(Path(folder))))
    except CheckpointError as error:
        return [str(error)]
    return []


def load_roberta(tower: nn.Module, folder: str) -> None:
    """Fill the text tower from a RoBERTa folder (``model.safetensors``, one file or several).

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    _fill(tower, folder, read_tensors(Path(folder)))


def _fill(tower: nn.Module, folder: str, tensors: NamedTensors) -> None:
    fill(tower, tensors, f"model.text.init: '{folder}'", [Rename(r"^roberta\.", "")], _UNUSED)
