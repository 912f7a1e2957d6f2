"""Configuration of the UNIMO-3 model and of its two towers.

Source: arXiv 2305.13697 (the model); METER, arXiv 2111.02387 (fusion sizes and norms).
"""

from typing import Any

import timm
from transformers import AutoConfig, ModernBertConfig, PreTrainedConfig, RobertaConfig, XLMRobertaConfig

from unimo3.errors import ConfigError
from unimo3.model.args import fusion_errors, image_errors, text_errors
from unimo3.versions import check_version

TextConfig = RobertaConfig | XLMRobertaConfig | ModernBertConfig
"""Configurations of the text tower's families."""
_TEXT_CONFIGS = {kind.model_type: kind for kind in (RobertaConfig, XLMRobertaConfig, ModernBertConfig)}


class Unimo3VisionConfig(PreTrainedConfig):
    """A timm vision transformer.

    Args:
        architecture: name of a timm ViT, such as ``vit_base_patch16_clip_quickgelu_224``.
        image_size: height and width of the input in pixels; a multiple of the patch size.
        overrides: keyword arguments for the timm constructor, such as ``{"depth": 4, "embed_dim": 128}``.
    """

    model_type = "unimo3_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        architecture: str = "vit_base_patch16_clip_quickgelu_224",
        image_size: int = 288,
        overrides: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.architecture = architecture
        self.image_size = image_size
        self.overrides = dict(overrides or {})
        super().__init__(**kwargs)

    def validate(self) -> list[str]:
        """Return the errors of these settings, one line each."""
        if not timm.is_model(self.architecture):
            return [
                f"model.vision.architecture: '{self.architecture}': timm has no such model; "
                "timm.list_models('vit*') lists them"
            ]
        return image_errors(self.architecture, self.image_size, self.overrides.get("patch_size", 0))


class Unimo3Config(PreTrainedConfig):
    """Everything needed to build a UNIMO-3 model, stored as ``config.json`` with its weights.

    Args:
        text_config: RoBERTa's configuration, XLM-RoBERTa's or ModernBERT's; without ``model_type`` RoBERTa's.
        vision_config: the image tower's configuration.
        hidden_size: fusion width D.
        num_hidden_layers: fusion layers L.
        num_attention_heads: fusion heads H; D / H is the head width.
        intermediate_size: inner width of the fusion feed-forward networks; 4 D when 0.
        interaction: ``in_layer`` (METER's co-attention) or ``cross_layer`` (every earlier level of the other modality).
        gate: how levels are weighed: ``token`` (per token and head), ``static`` (a learned constant per head) or
            ``uniform`` (their mean, no parameters).
        gate_init: weight of the in-layer level at initialization, in (0, 1); the other levels split the rest equally.
        unimodal_levels: top layers of the other modality's tower that join the levels, with separate keys and
            values.
        bridge: whether each fusion layer's input is joined by a tower layer's states, the last L of them (BridgeTower).
        itc_size: width of the contrastive projections.
        num_answers: classes of the question-answering head.
        version: of the folder that `save_pretrained` or an export writes, the weights' names included.

    Raises:
        ConfigError: a newer program wrote it, or its text tower is of another family.

    ``num_labels``, of every transformers configuration, is the number of classes of the other classifiers.
    """

    model_type = "unimo3"
    sub_configs = {"text_config": AutoConfig, "vision_config": Unimo3VisionConfig}

    def __init__(
        self,
        text_config: TextConfig | dict | None = None,
        vision_config: Unimo3VisionConfig | dict | None = None,
        hidden_size: int = 768,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 12,
        intermediate_size: int = 0,
        interaction: str = "cross_layer",
        gate: str = "token",
        gate_init: float = 0.9,
        unimodal_levels: int = 0,
        bridge: bool = True,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        itc_size: int = 256,
        itc_temperature_init: float = 0.07,
        num_answers: int = 0,
        tie_word_embeddings: bool = True,
        version: int = 1,
        **kwargs: Any,
    ):
        self.version = version
        check_version("config.json", {"version": version})
        if not isinstance(text_config, TextConfig):
            text_config = _text_config(text_config or {})
        if not isinstance(vision_config, Unimo3VisionConfig):
            vision_config = Unimo3VisionConfig(**(vision_config or {}))
        self.text_config = text_config
        self.vision_config = vision_config
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.interaction = interaction
        self.gate = gate
        self.gate_init = gate_init
        self.unimodal_levels = unimodal_levels
        self.bridge = bridge
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.itc_size = itc_size
        self.itc_temperature_init = itc_temperature_init
        self.num_answers = num_answers
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)

    @property
    def num_tower_states(self) -> int:
        """Top layers of each tower whose states the fusion encoder reads."""
        return max(1, self.unimodal_levels, self.num_hidden_layers if self.bridge else 0)

    def depth_errors(self, image_depth: int) -> list[str]:
        """Return where the settings need more layers of a tower than it has, one line per error.

        Args:
            image_depth: layers of the image tower, which only timm knows.
        """
        depths = {"model.text.num_hidden_layers": self.text_config.num_hidden_layers, "model.vision.depth": image_depth}
        errors = []
        for field, depth in depths.items():
            if self.bridge and self.num_hidden_layers > depth:
                errors.append(
                    f"model.bridge: true: needs a tower layer for each of the {self.num_hidden_layers} fusion layers, "
                    f"{field} is {depth}; lower model.num_hidden_layers or deepen the tower"
                )
            if self.unimodal_levels > depth:
                errors.append(
                    f"model.unimodal_levels: {self.unimodal_levels}: {field} is {depth}; lower it to at most that"
                )
        return errors

    def validate(self) -> list[str]:
        """Return the errors of these settings, one line each: field, value and fix."""
        return self.vision_config.validate() + text_errors(self.text_config) + fusion_errors(self)


def _text_config(fields: dict[str, Any]) -> TextConfig:
    family = fields.get("model_type", RobertaConfig.model_type)
    if family not in _TEXT_CONFIGS:
        raise ConfigError(f"config.json: text_config: '{family}': one of {', '.join(_TEXT_CONFIGS)} is supported")
    return _TEXT_CONFIGS[family](**fields)
