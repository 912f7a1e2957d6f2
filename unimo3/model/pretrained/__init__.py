"""Weights from elsewhere: Hugging Face folders and timm files for the towers; BridgeTower, UNIMO-3 for all."""

from unimo3.model.pretrained.bridgetower import (
    bridgetower_config,
    bridgetower_errors,
    fill_from_bridgetower,
    load_bridgetower,
    read_bridgetower_config,
)
from unimo3.model.pretrained.exported import exported_errors, load_exported, read_exported_config
from unimo3.model.pretrained.text import load_text, read_text_config, text_weight_errors
from unimo3.model.pretrained.vision import load_vision, vision_activation, vision_errors

__all__ = [
    "bridgetower_config",
    "bridgetower_errors",
    "exported_errors",
    "fill_from_bridgetower",
    "load_bridgetower",
    "load_exported",
    "load_text",
    "load_vision",
    "read_bridgetower_config",
    "read_exported_config",
    "read_text_config",
    "text_weight_errors",
    "vision_activation",
    "vision_errors",
]
