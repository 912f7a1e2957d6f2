"""Families of image encoders in Hugging Face folders: which sizes they have, and timm's names for their tensors.

Source: transformers' modeling_clip.py, modeling_siglip.py, modeling_dinov2.py and
modeling_dinov2_with_registers.py; timm's checkpoint filter of vision_transformer.py for DINOv2's class token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from unimo3.model.pretrained.fill import NamedTensors, Rename

# transformers omits the prefix where the image model is saved alone.
_START = r"^(?:vision_model\.)?"
_LAYER = _START + r"encoder\.layers\.(\d+)\."
_CLIP_NAMES = (
    Rename(_START + r"embeddings\.class_embedding$", "cls_token"),
    Rename(_START + r"embeddings\.patch_embedding\.", "patch_embed.proj."),
    Rename(_START + r"embeddings\.position_embedding\.weight$", "pos_embed"),
    Rename(_START + r"pre_layrnorm\.", "norm_pre."),
    Rename(_START + r"post_layernorm\.", "norm."),
    Rename(_LAYER + r"layer_norm(\d)\.", r"blocks.\1.norm\2."),
    Rename(_LAYER + r"mlp\.fc", r"blocks.\1.mlp.fc"),
    Rename(_LAYER + r"self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
    Rename(_LAYER + r"self_attn\.q_proj\.", r"blocks.\1.attn.qkv.", 0, 3),
    Rename(_LAYER + r"self_attn\.k_proj\.", r"blocks.\1.attn.qkv.", 1, 3),
    Rename(_LAYER + r"self_attn\.v_proj\.", r"blocks.\1.attn.qkv.", 2, 3),
)
_CLIP_UNUSED = r"^(text_model\.|text_projection|visual_projection|logit_scale)|position_ids$"
# SigLIP pools by a head with attention.
_SIGLIP_UNUSED = rf"{_CLIP_UNUSED}|^logit_bias$|{_START}head\."

_DINO = r"^(?:dinov2(?:_with_registers)?\.)?"
_DINO_LAYER = _DINO + r"encoder\.layer\.(\d+)\."
_CLASS_TOKEN, _POSITIONS = "embeddings.cls_token", "embeddings.position_embeddings"
_DINO_NAMES = (
    Rename(_DINO + r"embeddings\.cls_token$", "cls_token"),
    Rename(_DINO + r"embeddings\.register_tokens$", "reg_token"),
    Rename(_DINO + r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    Rename(_DINO + r"embeddings\.position_embeddings$", "pos_embed"),
    Rename(_DINO + r"layernorm\.", "norm."),
    Rename(_DINO_LAYER + r"norm(\d)\.", r"blocks.\1.norm\2."),
    Rename(_DINO_LAYER + r"layer_scale(\d)\.lambda1$", r"blocks.\1.ls\2.gamma"),
    Rename(_DINO_LAYER + r"mlp\.weights_in\.", r"blocks.\1.mlp.fc1."),
    Rename(_DINO_LAYER + r"mlp\.weights_out\.", r"blocks.\1.mlp.fc2."),
    Rename(_DINO_LAYER + r"mlp\.fc", r"blocks.\1.mlp.fc"),
    Rename(_DINO_LAYER + r"attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    Rename(_DINO_LAYER + r"attention\.attention\.query\.", r"blocks.\1.attn.qkv.", 0, 3),
    Rename(_DINO_LAYER + r"attention\.attention\.key\.", r"blocks.\1.attn.qkv.", 1, 3),
    Rename(_DINO_LAYER + r"attention\.attention\.value\.", r"blocks.\1.attn.qkv.", 2, 3),
)
_DINO_UNUSED = r"embeddings\.mask_token$|^classifier\."


@dataclass(frozen=True)
class VisionFamily:
    """How a family is read.

    Attributes:
        config: its configuration's class.
        name: for errors.
        renames: its tensors' names -> timm's.
        unused: pattern of the tensors that the tower does not use.
        num_class_tokens: 1 or 0.
        antialias: whether transformers resizes its position table with antialiasing.
    """

    config: type[PreTrainedConfig]
    name: str
    renames: tuple[Rename, ...]
    unused: str
    num_class_tokens: int
    antialias: bool = False

    def sizes(self, vision: Any) -> dict[str, Any]:
        """Of a configuration, what the tower must have too, under names for errors."""
        return {
            "width": vision.hidden_size,
            "depth": vision.num_hidden_layers,
            "patch_size": vision.patch_size,
            "num_heads": vision.num_attention_heads,
            "class tokens": self.num_class_tokens,
            "registers": getattr(vision, "num_register_tokens", 0),
            **_feed_forward_of(vision),
            "layer_norm_eps": vision.layer_norm_eps,
        }


FAMILIES = (
    VisionFamily(CLIPVisionConfig, "CLIP", _CLIP_NAMES, _CLIP_UNUSED, 1),
    VisionFamily(SiglipVisionConfig, "SigLIP", _CLIP_NAMES, _SIGLIP_UNUSED, 0),
    VisionFamily(Dinov2Config, "DINOv2", _DINO_NAMES, _DINO_UNUSED, 1),
    VisionFamily(Dinov2WithRegistersConfig, "DINOv2 with registers", _DINO_NAMES, _DINO_UNUSED, 1, antialias=True),
)


def family_of(vision: PreTrainedConfig) -> VisionFamily | None:
    """The family of an image encoder's configuration."""
    return next((family for family in FAMILIES if isinstance(vision, family.config)), None)


def _feed_forward_of(vision: Any) -> dict[str, Any]:
    if getattr(vision, "use_swiglu_ffn", False):
        # Rows of gate and values, as transformers computes them.
        inner = int(vision.hidden_size * vision.mlp_ratio)
        return {"inner width": 2 * ((int(inner * 2 / 3) + 7) // 8 * 8), "activation": "silu"}
    if hasattr(vision, "mlp_ratio"):
        return {"inner width": int(vision.hidden_size * vision.mlp_ratio), "activation": vision.hidden_act}
    return {"inner width": vision.intermediate_size, "activation": vision.hidden_act}


def with_class_position_added(tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """DINOv2's tensors for a tower whose position table has patches alone: the class token contains its position."""
    parts: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in tensors:
        part = next((part for part in (_CLASS_TOKEN, _POSITIONS) if name.endswith(part)), None)
        if part is None:
            yield name, tensor
        else:
            parts[part] = name, tensor.float()
    if len(parts) == 2:
        (token_name, token), (table_name, table) = parts[_CLASS_TOKEN], parts[_POSITIONS]
        parts = {_CLASS_TOKEN: (token_name, token + table[:, :1]), _POSITIONS: (table_name, table[:, 1:])}
    yield from parts.values()
