"""Weights for the image tower: a Hugging Face folder of one of `FAMILIES`, or a checkpoint file of timm.

The position tables are resized to the tower's grid: those of absolute positions bicubically, others as timm does.

Source: timm's vision_transformer.py for the names; timm's resample_abs_pos_embed.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from unimo3.errors import CheckpointError, ConfigError
from unimo3.model.pretrained.fill import (
    NamedTensors,
    Rename,
    fill,
    read_config,
    read_file,
    read_shapes,
    read_tensors,
    without_values,
)
from unimo3.model.pretrained.vision_families import FAMILIES, VisionFamily, family_of, with_class_position_added
from unimo3.model.vision import VisionTower

# A classifier, what belongs to pooling, and what follows from the sizes.
_TIMM_UNUSED = r"^(head|head_dist|attn_pool)\.|relative_position_index$|k_bias$|^rope\.freqs_(cos|sin)$"
# The final norm, where an architecture averages the tokens before it.
_FC_NORM = r"^fc_norm\."
_TIMM_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_WRAPPERS = ("state_dict", "model")
# transformers' names: timm's classes, and timm's names.
_ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "SiLU": "silu"}
_TIMM_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def vision_activation(path: str) -> dict[str, str]:
    """timm's argument for the activation of a Hugging Face folder; empty for a file, or where `vision_errors` has some.

    timm's SigLIPs of base size have another form of GELU than their weights were trained with.
    """
    if not Path(path).is_dir():
        return {}
    try:
        family, vision = _family_in(Path(path))
    except ConfigError:
        return {}
    name = _TIMM_ACTIVATIONS.get(family.sizes(vision)["activation"])
    return {"act_layer": name} if name else {}


def vision_errors(path: str, tower: VisionTower) -> list[str]:
    """Return why the weights at `path` do not fit a tower (which may be on the meta device), one line per error."""
    where = f"model.vision.init: '{path}'"
    family = None
    try:
        if Path(path).is_file():
            theirs = _timm_sizes(Path(path))
        else:
            family, vision = _family_in(Path(path))
            theirs = family.sizes(vision)
    except ConfigError as error:
        return error.errors
    except CheckpointError as error:
        return [f"{where}: {error}"]
    vit: Any = tower.vit
    ours = {"width": vit.embed_dim, "depth": len(vit.blocks), "patch_size": vit.patch_embed.patch_size[0]}
    if family is not None:
        block: Any = vit.blocks[0]
        if not isinstance(vit, VisionTransformer) or not hasattr(getattr(block, "mlp", None), "fc1"):
            return [
                f"{where}: is a {family.name}, model.vision a {type(vit).__name__} of timm with layers of another "
                "form; name a timm checkpoint file"
            ]
        ours |= {
            "num_heads": block.attn.num_heads,
            "class tokens": int(tower.has_class_token),
            "registers": tower.num_registers,
            "inner width": block.mlp.fc1.out_features,
            "activation": _ACTIVATIONS.get(type(block.mlp.act).__name__, type(block.mlp.act).__name__),
            "layer_norm_eps": block.norm1.eps,
        }
    errors = [
        f"{where}: has {name} {theirs[name]}, model.vision has {size}; use weights of the same architecture"
        for name, size in ours.items()
        if name in theirs and theirs[name] != size
    ]
    if not errors:
        try:
            _fill(tower, path, without_values(_shapes(Path(path))))
        except CheckpointError as error:
            errors.append(str(error))
    return errors


def load_vision(tower: VisionTower, path: str) -> None:
    """Fill the image tower from a folder of one of `FAMILIES` or a timm checkpoint file.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape, or the file cannot be read.
        ConfigError: the folder is missing or contains another model.
    """
    _fill(tower, path, _timm_tensors(Path(path)) if Path(path).is_file() else read_tensors(Path(path)))


def _fill(tower: VisionTower, path: str, tensors: NamedTensors) -> None:
    """Fill the image tower with the tensors at `path`; those on the meta device are only compared."""
    source = f"model.vision.init: '{path}'"
    if not Path(path).is_file():
        family, _ = _family_in(Path(path))
        if getattr(tower.vit, "no_embed_class", False):
            tensors = with_class_position_added(tensors)
        fit = position_fitter(tower, family.antialias)
        fill(tower.vit, tensors, source, family.renames, family.unused, adapt=fit)
        return
    renames, unused = (Rename(_FC_NORM, "norm."),), _TIMM_UNUSED
    if "norm.weight" in _shapes(Path(path)) or "norm.weight" not in dict(tower.vit.named_parameters()):
        unused += f"|{_FC_NORM}"
    fill(tower.vit, tensors, source, renames, unused, adapt=position_fitter(tower))


def position_fitter(tower: VisionTower, antialias: bool = False) -> Any:
    """A `fill` adapter: position tables at the tower's grid, class tokens and tables with timm's leading axes.

    Tables of relative positions have their values for the class token at the end.

    Args:
        antialias: of the tables of absolute positions, where they are resized.
    """
    vit: Any = tower.vit
    grid = list(vit.patch_embed.grid_size)
    num_prefix = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens

    def fit(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        if name.endswith("cls_token"):
            return tensor.reshape(1, 1, -1)
        if name.endswith("relative_position_bias_table") and tensor.ndim == len(shape) == 2:
            num_class = shape[0] - (2 * grid[0] - 1) * (2 * grid[1] - 1)
            num_positions = max(0, tensor.shape[0] - num_class)
            if not num_positions or math.isqrt(num_positions) ** 2 != num_positions:
                return tensor  # not of a square grid: an error of shape
            resized: Tensor = resize_rel_pos_bias_table(tensor, (grid[0], grid[1]), shape)
            return resized
        if not name.endswith("pos_embed"):
            return tensor
        table = tensor.reshape(1, -1, tensor.shape[-1]).float()
        side = math.isqrt(table.shape[1] - num_prefix)
        if table.shape[1] - num_prefix != side * side:
            return tensor  # not of a square grid: an error of shape
        return resample_abs_pos_embed(table, grid, num_prefix_tokens=num_prefix, antialias=antialias)

    return fit


def _family_in(folder: Path) -> tuple[VisionFamily, Any]:
    """The family of a folder's image encoder, and its configuration."""
    where, names = f"model.vision.init: '{folder}'", ", ".join(family.name for family in FAMILIES)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{where}: neither a file nor a folder with config.json; name a local Hugging Face folder ({names}) or a "
            f"timm checkpoint file ({', '.join(_TIMM_SUFFIXES)})"
        )
    config = read_config("model.vision.init", str(folder), "CLIP")
    vision: Any = getattr(config, "vision_config", config)
    family = family_of(vision)
    if family is None:
        raise ConfigError(f"{where}: contains a '{config.model_type}' model; one of {names} is needed")
    return family, vision


def _timm_sizes(file: Path) -> dict[str, int]:
    shapes = _shapes(file)
    if "patch_embed.proj.weight" not in shapes:
        raise CheckpointError("contains no 'patch_embed.proj.weight'; name a checkpoint of one of timm's transformers")
    width, _, _, patch = shapes["patch_embed.proj.weight"]
    blocks = {match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {"width": width, "depth": len(blocks), "patch_size": patch}


def _shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of the tensors of a folder or a file."""
    if path.is_file() and path.suffix != ".safetensors":
        return {name: list(tensor.shape) for name, tensor in _unpickled(path).items()}
    return read_shapes(path)


def _timm_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        return read_file(file)
    return iter(_unpickled(file).items())


def _unpickled(file: Path) -> dict[str, Tensor]:
    """A pickled checkpoint's tensors, mapped into memory; no code in it is run."""
    if file.suffix not in _TIMM_SUFFIXES:
        raise CheckpointError(f"unknown kind of file; one of {', '.join(_TIMM_SUFFIXES)} is read")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"cannot be read as plain tensors ({first}); save it again as .safetensors") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise CheckpointError("contains no dictionary of tensors; save a timm model's state_dict()")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
