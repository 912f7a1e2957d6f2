"""Folders that ``python -m pretrain.export`` wrote, or ``save_pretrained``: the complete model.

Source: the safetensors format.
"""

from pathlib import Path
from typing import cast

import torch

from unimo3.errors import CheckpointError, ConfigError
from unimo3.model.config import Unimo3Config
from unimo3.model.pretrained.fill import NamedTensors, fill, read_config, read_shapes, read_tensors, without_values
from unimo3.model.pretrained.vision import position_fitter
from unimo3.model.unimo3 import Unimo3Model, Unimo3PreTrainedModel


def read_exported_config(folder: str, has_weights: bool = True, field: str = "init") -> Unimo3Config:
    """Read an exported folder's configuration, or that of a run's ``model``, which has no weights next to it.

    Args:
        field: setting that named the folder, for errors.

    Raises:
        ConfigError: there is none that can be read, or it is another model's.
    """
    config = read_config(field, folder, "UNIMO-3", has_weights)
    if not isinstance(config, Unimo3Config):
        raise ConfigError(
            f"{field}: '{folder}': contains a '{config.model_type}' model; an exported UNIMO-3 one is needed"
        )
    return config


def exported_errors(
    folder: str, model_class: type[Unimo3PreTrainedModel], config: Unimo3Config, fresh: str, field: str = "init"
) -> list[str]:
    """Return why an exported folder's weights do not fit a model, by the files' headers alone; see `load_exported`."""
    try:
        with torch.device("meta"):
            model = model_class(config)
        _fill(model, folder, without_values(read_shapes(Path(folder))), fresh, field)
    except CheckpointError as error:
        return [str(error)]
    return []


def load_exported(model: Unimo3PreTrainedModel, folder: str, fresh: str = r"^$", field: str = "init") -> None:
    """Fill a model from an exported folder; the position table of images is resized bicubically to the model's grid.

    The model's class names the tensors there that it does not use, as for `from_pretrained`.

    Args:
        fresh: pattern of parameters that may be missing there and keep their initial values.
        field: setting that named the folder, for errors.

    Raises:
        CheckpointError: any other tensor is missing, unexpected or of another shape.
    """
    _fill(model, folder, read_tensors(Path(folder)), fresh, field)


def _fill(model: Unimo3PreTrainedModel, folder: str, tensors: NamedTensors, fresh: str, field: str) -> None:
    fit = position_fitter(cast(Unimo3Model, model.unimo3).vision_tower)
    # The class's own: transformers adds those of its parts to an object's, and `Unimo3Model` has no use for any head.
    unused = "|".join(type(model)._keys_to_ignore_on_load_unexpected or [r"^$"])
    fill(model, tensors, f"{field}: '{folder}'", unused=unused, fresh=fresh, adapt=fit)
