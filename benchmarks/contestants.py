"""The models compared by their training steps, at equal sizes and on equal batches.

BridgeTower is trained as METER and its authors train it: one full pass through towers and fusion for MLM and another
for ITM, MLM scores for every token. Ours runs the towers once for both and scores masked tokens alone.

Source: transformers' modeling_bridgetower.py; METER, arXiv 2111.02387; BridgeTower, arXiv 2206.08657.
"""

# Shapes: B batch, T text tokens, S pixels a side.

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BridgeTowerConfig, BridgeTowerModel
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerITMHead, BridgeTowerMLMHead

from unimo3.model.config import Unimo3Config
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.objectives.args import ItcArgs, ObjectivesArgs
from unimo3.objectives.base import PretrainingLoss

BRIDGETOWER, IN_LAYER, CROSS_LAYER = CONTESTANTS = ("bridgetower", "in_layer", "cross_layer")
HEAD_WIDTH = 64  # BridgeTower's image tower has no other.
IMPLEMENTATIONS = ("eager", "sdpa")
PADDING, MASK_ID, FIRST_WORD_ID = 1, 4, 5
MASKED_FRACTION, WRONG_FRACTION = 0.15, 0.5


@dataclass(frozen=True)
class Size:
    """What all contestants have in common; one width for the towers and the fusion encoder."""

    width: int
    tower_layers: int
    fusion_layers: int
    image_size: int
    num_tokens: int
    vocab_size: int
    patch_size: int = 16

    @property
    def text(self) -> dict[str, Any]:
        """RoBERTa's settings, which BridgeTower's text configuration has too."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.tower_layers,
            "num_attention_heads": self.width // HEAD_WIDTH,
            "intermediate_size": 4 * self.width,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "pad_token_id": PADDING,
            "layer_norm_eps": 1e-5,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
        }


class BridgeTowerForPreTraining(nn.Module):
    """Both pretraining heads of transformers' BridgeTower on one model; the MLM decoder is tied to the words."""

    def __init__(self, size: Size):
        super().__init__()
        config = BridgeTowerConfig(
            hidden_size=size.width,
            num_hidden_layers=size.fusion_layers,
            num_attention_heads=size.width // HEAD_WIDTH,
            text_config=size.text,
            vision_config={
                "hidden_size": size.width,
                "num_hidden_layers": size.tower_layers,
                "patch_size": size.patch_size,
                "image_size": size.image_size,
            },
        )
        self.bridgetower = BridgeTowerModel(config)
        self.bridgetower.text_model.pooler = None  # the model never calls it
        self.mlm_score = BridgeTowerMLMHead(config, weight=self.bridgetower.get_input_embeddings().weight)
        self.itm_score = BridgeTowerITMHead(2 * size.width)

    def set_attention(self, implementation: str) -> None:
        """Choose how text and fusion layers attend: eager or sdpa.

        transformers offers this model eager attention alone, but its layers look the function up by name and support
        sdpa as well; the comparison lets them.
        """
        config = self.bridgetower.config
        config._attn_implementation = config.text_config._attn_implementation = implementation

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """The sum of both losses; see `draw_batch`."""
        mask, pixels = batch["attention_mask"], batch["pixel_values"]
        masked = self.bridgetower(batch["mlm_input_ids"], mask, pixel_values=pixels)
        scores = self.mlm_score(masked.text_features)
        mlm = cross_entropy(scores.flatten(0, 1), batch["mlm_labels"].flatten())
        is_wrong = torch.arange(len(pixels), device=pixels.device) < len(pixels) * WRONG_FRACTION
        images = torch.where(is_wrong[:, None, None, None], pixels.roll(1, dims=0), pixels)
        matched = self.bridgetower(batch["input_ids"], mask, pixel_values=images)
        itm = cross_entropy(self.itm_score(matched.pooler_output), (~is_wrong).long())
        return mlm + itm


class OursForPreTraining(nn.Module):
    """UNIMO-3 with MLM and ITM, as `pretrain.train` runs it."""

    def __init__(self, size: Size, interaction: str, compile_towers: bool):
        super().__init__()
        heads = size.width // HEAD_WIDTH
        config = Unimo3Config(
            text_config=size.text,
            vision_config={
                "image_size": size.image_size,
                "overrides": {
                    "patch_size": size.patch_size,
                    "embed_dim": size.width,
                    "depth": size.tower_layers,
                    "num_heads": heads,
                },
            },
            hidden_size=size.width,
            num_hidden_layers=size.fusion_layers,
            num_attention_heads=heads,
            interaction=interaction,
            gate="token",
            bridge=True,  # as BridgeTower
        )
        model = Unimo3ForPreTraining(config)
        if compile_towers:
            model.unimo3.compile_towers()
        self.task = PretrainingLoss(model, ObjectivesArgs(itc=ItcArgs(weight=0.0)).build(seed=0))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """The sum of both losses; see `draw_batch`."""
        return self.task(batch)["loss"]


def build(name: str, size: Size, compile_towers: bool = False) -> nn.Module:
    """One of `CONTESTANTS` with random weights, in training mode; `compile_towers` is for ours."""
    torch.manual_seed(0)
    if name == BRIDGETOWER:
        return BridgeTowerForPreTraining(size).train()
    return OursForPreTraining(size, name, compile_towers).train()


def draw_batch(size: Size, num_pairs: int, seed: int) -> dict[str, Any]:
    """Random pairs as `unimo3.data.loader` yields them; a text's length is even between half of T and T."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_pairs, size.num_tokens)
    ids = torch.randint(FIRST_WORD_ID, size.vocab_size, shape, generator=generator)
    lengths = torch.randint(size.num_tokens // 2, size.num_tokens + 1, (num_pairs, 1), generator=generator)
    mask = (torch.arange(size.num_tokens) < lengths).long()
    ids[mask == 0] = PADDING
    to_predict = (torch.rand(shape, generator=generator) < MASKED_FRACTION) & (mask == 1)
    to_predict[:, 1] = True  # at least one a text
    return {
        "pixel_values": torch.randn(num_pairs, 3, size.image_size, size.image_size, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "mlm_input_ids": ids.masked_fill(to_predict, MASK_ID),
        "mlm_labels": ids.masked_fill(~to_predict, -100),
        "image_id": torch.arange(num_pairs),
        "positions": torch.arange(num_pairs),
    }
