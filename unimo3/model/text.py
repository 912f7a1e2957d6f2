"""The text tower: an encoder of transformers, of the families RoBERTa, XLM-RoBERTa and ModernBERT.

Source: arXiv 1907.11692 (RoBERTa), 1911.02116 (XLM-RoBERTa), 2412.13663 (ModernBERT); transformers' AutoModel.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_MAPPING, ModernBertConfig, PreTrainedModel
from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding

from unimo3.model.config import TextConfig


def build_text_tower(config: TextConfig) -> PreTrainedModel:
    """The encoder of a configuration, without a pooling layer and with transformers' names of parameters."""
    options = {} if isinstance(config, ModernBertConfig) else {"add_pooling_layer": False}
    # AutoModel.from_config would build it in the dtype of the folder's weights, and change the configuration.
    model_class: Any = MODEL_MAPPING[type(config)]
    tower: PreTrainedModel = model_class(config, **options)
    for module in tower.modules():
        if type(module) is ModernBertRotaryEmbedding:
            module.__class__ = _RotaryEmbedding
    return tower


def text_layers(tower: nn.Module) -> list[nn.Module]:
    """The tower's transformer layers, the lowest first."""
    encoder: Any = getattr(tower, "encoder", None)
    layers: Any = tower.layers if encoder is None else encoder.layer
    return list(layers)


class _RotaryEmbedding(ModernBertRotaryEmbedding):
    """ModernBERT's, whose frequencies stay float32 when the model is cast to the dtype of training.

    DeepSpeed casts buffers too. In bfloat16 the angles of token 100 would be wrong by up to 0.2.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_RotaryEmbedding":
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)
        return self
