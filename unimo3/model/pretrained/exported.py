"""Folders that ``python -m pretrain.export`` wrote, or ``save_pretrained``: the complete model.

Source: the safetensors format.
"""

from pathlib import Path
from typing import cast

from unimo3.errors import ConfigError
from unimo3.model.config import Unimo3Config
from unimo3.model.pretrained.fill import fill, read_config, read_tensors
from unimo3.model.pretrained.vision import position_fitter
from unimo3.model.unimo3 import Unimo3Model, Unimo3PreTrainedModel


def read_exported_config(folder: str, has_weights: bool = True) -> Unimo3Config:
    """Read an exported folder's configuration, or that of a run's ``model``, which has no weights next to it.

    Raises:
        ConfigError: there is none, or it is another model's.
    """
    if not folder:
        raise ConfigError("init: '': names no weights; name an exported folder, or a run or one of its checkpoints")
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"init: '{folder}': no config.json there; name a folder that python -m pretrain.export wrote")
    config = read_config("init", folder, "UNIMO-3", has_weights)
    if not isinstance(config, Unimo3Config):
        raise ConfigError(
            f"init: '{folder}': contains a '{config.model_type}' model; an exported UNIMO-3 one is needed"
        )
    return config


def load_exported(model: Unimo3PreTrainedModel, folder: str, fresh: str = r"^$") -> None:
    """Fill a model from an exported folder; the position table of images is resized bicubically to the model's grid.

    The model's class names the tensors there that it does not use, as for `from_pretrained`.

    Args:
        fresh: pattern of parameters that may be missing there and keep their initial values.

    Raises:
        CheckpointError: any other tensor is missing, unexpected or of another shape.
    """
    fit = position_fitter(cast(Unimo3Model, model.unimo3).vision_tower)
    unused = "|".join(model._keys_to_ignore_on_load_unexpected or [r"^$"])
    fill(model, read_tensors(Path(folder)), f"init: '{folder}'", unused=unused, fresh=fresh, adapt=fit)
