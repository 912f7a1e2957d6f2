"""Smallest real models and batches for tests."""

import torch

from unimo3.model.config import Unimo3Config
from unimo3.model.initialization import initialize_weights
from unimo3.model.level_gate import LevelGate
from unimo3.model.unimo3 import Unimo3ForPreTraining

VOCABULARY = 60


def tiny_config(**changes) -> Unimo3Config:
    """Two-layer towers and three fusion layers of width 32, 16-pixel images, no dropout."""
    settings = {
        "text_config": {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 20,
            "type_vocab_size": 1,
            "pad_token_id": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "vision_config": {
            "image_size": 16,
            "overrides": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        },
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        # More fusion layers than a tower has.
        "bridge": False,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "itc_size": 16,
    }
    return Unimo3Config(**(settings | changes))


def tiny_pretraining_model(seed: int = 0, **changes) -> Unimo3ForPreTraining:
    """A pretraining model with seeded weights of larger spread than usual, so that outputs differ visibly."""
    model = Unimo3ForPreTraining(tiny_config(**changes))
    initialize_weights(model, seed, std=0.1)
    return model


def spread_gates(model: torch.nn.Module) -> None:
    """Give token gates weights, so that gates differ from token to token; they start at zero."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, LevelGate) and module.weight is not None:
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * 0.3)


def tiny_batch(num_samples: int, seed: int = 0, num_tokens: int = 10) -> dict:
    """A batch as the loader yields it, with padded texts and two captions of image 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (num_samples, num_tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(num_samples):
        mask[row, 4 + row % (num_tokens - 3) :] = 0
    ids[mask == 0] = 1
    labels = torch.full_like(ids, -100)
    labels[:, 1] = ids[:, 1]
    labels[::2, 2] = ids[::2, 2]
    masked = torch.where(labels != -100, torch.full_like(ids, 4), ids)
    image_id = torch.arange(num_samples)
    image_id[1] = 0
    return {
        "pixel_values": torch.randn(num_samples, 3, 16, 16, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "mlm_input_ids": masked,
        "mlm_labels": labels,
        "image_id": image_id,
        "positions": torch.arange(num_samples),
        "num_replaced": 0,
        "keys": [str(row) for row in range(num_samples)],
    }


def rows(batch: dict, start: int, stop: int) -> dict:
    """Some rows of a batch."""
    return {key: value[start:stop] if hasattr(value, "__getitem__") else value for key, value in batch.items()}
