"""RoBERTa's weights for the text tower.

Source: transformers' modeling_roberta.py for the names.
"""

from pathlib import Path

from torch import nn
from transformers import RobertaConfig

from unimo3.errors import ConfigError
from unimo3.model.pretrained.fill import Rename, fill, read_config, read_tensors

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


def load_roberta(tower: nn.Module, folder: str) -> None:
    """Fill the text tower from a RoBERTa folder (``model.safetensors``, one file or several).

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    fill(tower, read_tensors(Path(folder)), f"model.text.init: '{folder}'", [Rename(r"^roberta\.", "")], _UNUSED)
