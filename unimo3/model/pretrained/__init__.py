"""Weights from elsewhere: RoBERTa, CLIP, timm for the towers; BridgeTower, exported UNIMO-3 for the complete model."""

from unimo3.model.pretrained.bridgetower import (
    bridgetower_config,
    bridgetower_errors,
    fill_from_bridgetower,
    load_bridgetower,
    read_bridgetower_config,
)
from unimo3.model.pretrained.exported import exported_errors, load_exported, read_exported_config
from unimo3.model.pretrained.roberta import load_roberta, read_roberta_config, roberta_errors
from unimo3.model.pretrained.vision import load_vision, vision_errors

__all__ = [
    "bridgetower_config",
    "bridgetower_errors",
    "exported_errors",
    "fill_from_bridgetower",
    "load_bridgetower",
    "load_exported",
    "load_roberta",
    "load_vision",
    "read_bridgetower_config",
    "read_exported_config",
    "read_roberta_config",
    "roberta_errors",
    "vision_errors",
]
