"""Weights from elsewhere: RoBERTa and CLIP folders for the towers, exported UNIMO-3 folders for the whole model.

Every key is either used, on an explicit list of keys that this model has no place for, or named in an error. Tensors
are read one at a time, so no rank holds a second copy of the model, sharded by ZeRO-3 or not.

Source: transformers' modeling_roberta.py and modeling_clip.py for the key names; timm's resample_abs_pos_embed.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionConfig, RobertaConfig

from unimo3.errors import CheckpointError, ConfigError
from unimo3.model.config import Unimo3Config
from unimo3.model.init import gathered
from unimo3.model.vision import VisionTower

_ROBERTA_UNUSED = re.compile(r"^(roberta\.)?(pooler\.|embeddings\.(position_ids|token_type_ids)$)|^lm_head\.")
_CLIP_UNUSED = re.compile(
    r"^(text_model\.|text_projection|visual_projection|logit_scale)|position_ids$|^vision_model\.embeddings\.position_ids"
)
_NO_WEIGHTS = (
    "no .safetensors file there; convert older formats with transformers' from_pretrained(...).save_pretrained(...)"
)
_CLIP_KEYS = (
    (r"^vision_model\.embeddings\.class_embedding$", "cls_token"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^vision_model\.pre_layrnorm\.", "norm_pre."),
    (r"^vision_model\.post_layernorm\.", "norm."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.fc", r"blocks.\1.mlp.fc"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"blocks.\1.attn.qkv.\2."),
)


def read_roberta_config(folder: str) -> RobertaConfig:
    """Read a RoBERTa folder's configuration.

    Raises:
        ConfigError: the folder is missing or holds another model.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(
            f"model.text.init: '{folder}': no config.json there; name a local Hugging Face RoBERTa folder"
        )
    if not any(Path(folder).glob("*.safetensors")):
        raise ConfigError(f"model.text.init: '{folder}': {_NO_WEIGHTS}")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, RobertaConfig):
        raise ConfigError(f"model.text.init: '{folder}': holds a '{config.model_type}' model; a RoBERTa one is needed")
    return config


def load_roberta(tower: nn.Module, folder: str) -> None:
    """Fill the text tower from a RoBERTa folder (``model.safetensors``, one file or several).

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """

    def place(name: str) -> str | None:
        return None if _ROBERTA_UNUSED.search(name) else name.removeprefix("roberta.")

    _fill(tower, _tensors(Path(folder)), place, folder)


def read_clip_faults(folder: str, tower: VisionTower) -> list[str]:
    """Say why the image weights of a CLIP folder do not fit a tower, one line a fault."""
    where = f"model.vision.init: '{folder}'"
    if not (Path(folder) / "config.json").is_file():
        return [f"{where}: no config.json there; name a local Hugging Face CLIP folder"]
    if not any(Path(folder).glob("*.safetensors")):
        return [f"{where}: {_NO_WEIGHTS}"]
    config = AutoConfig.from_pretrained(folder)
    vision = getattr(config, "vision_config", config)
    if not isinstance(vision, CLIPVisionConfig):
        return [f"{where}: holds a '{config.model_type}' model; a CLIP one is needed"]
    vit: Any = tower.vit
    sizes = {
        "width": (vision.hidden_size, vit.embed_dim),
        "depth": (vision.num_hidden_layers, len(vit.blocks)),
        "patch_size": (vision.patch_size, vit.patch_embed.patch_size[0]),
    }
    return [
        f"{where}: has {name} {theirs}, model.vision says {ours}; use weights of the same architecture"
        for name, (theirs, ours) in sizes.items()
        if theirs != ours
    ]


def load_clip(vit: nn.Module, folder: str) -> None:
    """Fill the image tower from a CLIP folder, resizing its position table to this tower's grid.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """

    def place(name: str) -> str | None:
        if _CLIP_UNUSED.search(name):
            return None
        for pattern, replacement in _CLIP_KEYS:
            new, count = re.subn(pattern, replacement, name)
            if count:
                return new
        return name

    _fill(vit, _fit_to_timm(_tensors(Path(folder)), place, vit), lambda name: name, folder)


def load_exported(model: nn.Module, folder: str, fresh: str = r"^$", unused: str = r"^$") -> None:
    """Fill a model from an exported folder.

    Args:
        fresh: pattern of parameters that may be missing there and keep their initial values.
        unused: pattern of tensors there that this model has no place for.

    Raises:
        CheckpointError: any other tensor is missing, unexpected or of another shape.
    """
    _fill(
        model,
        _tensors(Path(folder)),
        lambda name: None if re.search(unused, name) else name,
        folder,
        lambda name: bool(re.search(fresh, name)),
    )


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors files, one at a time."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: {_NO_WEIGHTS}")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, tensors.get_tensor(name)


def _fit_to_timm(
    tensors: Iterator[tuple[str, Tensor]], place: Callable[[str], str | None], vit: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """CLIP's tensors under timm's names: joined q, k, v, a batch axis, the position table at this tower's size."""
    parts: dict[str, dict[str, Tensor]] = {}
    for source, tensor in tensors:
        name = place(source)
        if name is None:
            continue
        joined = re.match(r"(blocks\.\d+\.attn\.qkv\.)([qkv])\.(weight|bias)$", name)
        if joined:
            key = joined[1] + joined[3]
            parts.setdefault(key, {})[joined[2]] = tensor
            if len(parts[key]) == 3:
                found = parts.pop(key)
                yield key, torch.cat([found["q"], found["k"], found["v"]])
        elif name == "cls_token":
            yield name, tensor.reshape(1, 1, -1)
        elif name == "pos_embed":
            grid = getattr(vit, "patch_embed").grid_size  # noqa: B009  (typed as a plain module)
            yield name, resample_abs_pos_embed(tensor[None].float(), list(grid), num_prefix_tokens=1, antialias=False)
        else:
            yield name, tensor


def _fill(
    module: nn.Module,
    tensors: Iterator[tuple[str, Tensor]],
    place: Callable[[str], str | None],
    folder: str,
    may_be_missing: Callable[[str], bool] = lambda name: False,
) -> None:
    parameters = dict(module.named_parameters())
    missing = {name for name in parameters if not may_be_missing(name)}
    unexpected, misfits = [], []
    for source, tensor in tensors:
        name = place(source)
        if name is None:
            continue
        parameter = parameters.get(name)
        if parameter is None:
            unexpected.append(source)
            continue
        with ExitStack() as stack:
            stack.enter_context(gathered([parameter]))
            stack.enter_context(torch.no_grad())
            if parameter.shape != tensor.shape:
                misfits.append(f"{source} {tuple(tensor.shape)} (here {tuple(parameter.shape)})")
            else:
                parameter.copy_(tensor)
        missing.discard(name)
    problems = [
        f"{kind}: {', '.join(sorted(names)[:5])}{' and more' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misfits))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{folder}: its tensors do not fit {type(module).__name__}; {'; '.join(problems)}. "
            "Use weights of the same architecture and sizes"
        )


def read_exported_config(folder: str) -> Unimo3Config:
    """Read an exported folder's configuration.

    Raises:
        ConfigError: there is none, or it is another model's.
    """
    if not folder or not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"init: '{folder}': no config.json there; name a folder that python -m pretrain.export wrote")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, Unimo3Config):
        raise ConfigError(f"init: '{folder}': holds a '{config.model_type}' model; an exported UNIMO-3 one is needed")
    return config
