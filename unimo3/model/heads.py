"""Heads on the fused states: masked language modeling, image-text matching, contrast, classification.

Source: METER, arXiv 2111.02387, for MLM, ITM and the classifiers; ALBEF, arXiv 2107.07651, for the contrastive
projections.
"""

# Shapes: B batch, N any number of tokens, n tower states (the last one on top), D fusion width.

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from unimo3.model.args import TEMPERATURE_BOUNDS
from unimo3.model.config import Unimo3Config


class _ClampWithReturn(torch.autograd.Function):
    """A clamp that zeroes only gradients leading further out; with a plain one, a value out of bounds never returns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.bounds
        # A step goes against the gradient.
        leads_out = ((x <= low) & (grad > 0)) | ((x >= high) & (grad < 0))
        return grad.masked_fill(leads_out, 0.0), None, None


class MlmHead(nn.Module):
    """Scores of every vocabulary entry for fused text states; the decoder's weight can be the word embedding's."""

    def __init__(self, config: Unimo3Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.text_config.vocab_size)

    def forward(self, states: Tensor) -> Tensor:
        """[N, D] -> [N, vocabulary]."""
        return self.decoder(self.norm(gelu(self.dense(states))))


class ItmHead(nn.Module):
    """Whether text and image belong together: logits of (no, yes)."""

    def __init__(self, config: Unimo3Config):
        super().__init__()
        self.classifier = nn.Linear(2 * config.hidden_size, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, 2 D] -> [B, 2]."""
        return self.classifier(pooled)


class ItcOutput(NamedTuple):
    """Unit vectors of both modalities, [B, itc_size] each, and the temperature."""

    text: Tensor
    image: Tensor
    temperature: Tensor


class ItcHead(nn.Module):
    """Projects each tower's first token to a common space; the temperature is learned within [0.001, 0.5]."""

    def __init__(self, config: Unimo3Config, image_width: int):
        super().__init__()
        self.text = nn.Linear(config.text_config.hidden_size, config.itc_size)
        self.image = nn.Linear(image_width, config.itc_size)
        self.temperature_init = config.itc_temperature_init
        self.temperature = nn.Parameter(torch.full((1,), self.temperature_init))

    def forward(self, text_states: Tensor, image_states: Tensor) -> ItcOutput:
        """Tower states [B, n, tokens, width] -> unit vectors and temperature."""
        return ItcOutput(
            self.embed_text(text_states),
            self.embed_image(image_states),
            _ClampWithReturn.apply(self.temperature.float(), *TEMPERATURE_BOUNDS),
        )

    def embed_text(self, states: Tensor) -> Tensor:
        """The text tower's states [B, n, T, width] -> unit vectors [B, itc_size], float32."""
        return normalize(self.text(states[:, -1, 0]).float(), dim=-1)

    def embed_image(self, states: Tensor) -> Tensor:
        """The image tower's states [B, n, V, width] -> unit vectors [B, itc_size], float32."""
        return normalize(self.image(states[:, -1, 0]).float(), dim=-1)


class SecondImageShift(nn.Module):
    """What marks the second of two images: a vector that starts at zero, so that both begin as pretraining saw them."""

    def __init__(self, config: Unimo3Config):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, num_pairs: int) -> Tensor:
        """Zero for the B first images, the vector for the B second ones: [2 B, D]."""
        second = self.vector.expand(num_pairs, -1)
        return torch.cat([torch.zeros_like(second), second])


class ClassifierHead(nn.Module):
    """Scores of a task's classes for pooled states.

    Args:
        width: of the pooled states: 2 D for one image, 4 D for two.
        num_classes: of the task.
    """

    def __init__(self, config: Unimo3Config, width: int, num_classes: int):
        super().__init__()
        inner = 2 * config.hidden_size
        self.dense = nn.Linear(width, inner)
        self.norm = nn.LayerNorm(inner, eps=1e-5)
        self.classifier = nn.Linear(inner, num_classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, width] -> [B, classes]."""
        return self.classifier(gelu(self.norm(self.dense(pooled))))
