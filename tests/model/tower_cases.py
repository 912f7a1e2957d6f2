"""Small towers for the tests of towers and of their files."""

import torch
from transformers import CLIPVisionConfig

from unimo3.model.config import Unimo3VisionConfig
from unimo3.model.vision import VisionTower

DEPTH = 3
ARCHITECTURE = "vit_base_patch16_clip_quickgelu_224"
SIZES = {"patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2}
TEXT_SIZES = {
    **{"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
    **{"max_position_embeddings": 20, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
}


def spread(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def image_tower(image_size: int, num_states: int = 1) -> VisionTower:
    return VisionTower(Unimo3VisionConfig(ARCHITECTURE, image_size, dict(SIZES)), num_states).eval()


def clip_vision(image_size: int = 16) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        patch_size=8,
        image_size=image_size,
    )


def tower_of(architecture: str, image_size: int = 16) -> VisionTower:
    return VisionTower(Unimo3VisionConfig(architecture, image_size, dict(SIZES)), DEPTH).eval()
