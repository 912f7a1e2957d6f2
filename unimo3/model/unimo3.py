"""Assembly of the UNIMO-3 model behind the Hugging Face conventions.

Source: arXiv 2305.13697; transformers' PreTrainedModel for saving, loading and tying.
"""

# Shapes: B batch, T text tokens, V image tokens, n tower states (the last one on top), W tower width,
# D fusion width, H heads, S visible levels.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, PreTrainedModel
from transformers.utils import ModelOutput

from unimo3.errors import ConfigError
from unimo3.model.attention import CrossLayerAttention
from unimo3.model.config import Unimo3Config
from unimo3.model.fusion import FusionEncoder, FusionOutput
from unimo3.model.heads import ItcHead, ItcOutput, ItmHead, MlmHead
from unimo3.model.initialization import initialize_module
from unimo3.model.text import build_text_tower
from unimo3.model.vision import VisionTower


@dataclass
class Unimo3ModelOutput(ModelOutput):
    """Fused states.

    Attributes:
        text_features: [B, T, D].
        image_features: [B, V, D].
        pooler_output: [B, 2 D], the first tokens of both streams.
        text_gates: on request, one [B, T, H, S] tensor for each layer, lowest level first (None where a layer has no
            gate).
        image_gates: the same, [B, V, H, S].
    """

    text_features: Tensor | None = None
    image_features: Tensor | None = None
    pooler_output: Tensor | None = None
    text_gates: tuple[Tensor | None, ...] | None = None
    image_gates: tuple[Tensor | None, ...] | None = None


@dataclass
class Unimo3PreTrainingOutput(ModelOutput):
    """Logits of the pretraining heads.

    Attributes:
        prediction_logits: [B, T, vocabulary].
        matching_logits: [B, 2], (no, yes).
        logits_per_image: [B, B], contrastive similarities over the temperature.
        text_gates, image_gates: on request, see `Unimo3ModelOutput`.
    """

    prediction_logits: Tensor | None = None
    matching_logits: Tensor | None = None
    logits_per_image: Tensor | None = None
    text_gates: tuple[Tensor | None, ...] | None = None
    image_gates: tuple[Tensor | None, ...] | None = None


class Unimo3PreTrainedModel(PreTrainedModel):
    """The base class of all UNIMO-3 models."""

    config_class = Unimo3Config
    base_model_prefix = "unimo3"
    main_input_name = "input_ids"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules = ["StreamLayer", "RobertaLayer", "XLMRobertaLayer", "ModernBertEncoderLayer", "Block"]

    def __init__(self, config: Unimo3Config):
        errors = config.validate()
        if errors:
            raise ConfigError(errors)
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        initialize_module(module, self.config.initializer_range)
        compute_buffers: Any = getattr(module, "init_non_persistent_buffers", None)
        if compute_buffers is not None:  # timm's relative and rotary positions, which no file has
            compute_buffers()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            # It sees only tensors among a layer's arguments: the levels' gradients would be lost.
            raise ValueError("use_reentrant=True: not supported; leave it out or set it to False")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)
        for module in self.modules():
            if isinstance(module, VisionTower):
                # timm has a separate switch.
                module.vit.set_grad_checkpointing(enable)


class Unimo3Model(Unimo3PreTrainedModel):
    """Towers and fusion encoder, without a head."""

    _keys_to_ignore_on_load_unexpected = [r"^(\w+_head|image_shift)\."]

    def __init__(self, config: Unimo3Config):
        super().__init__(config)
        self.text_tower = build_text_tower(config.text_config)
        self.vision_tower = VisionTower(config.vision_config, config.num_tower_states)
        errors = config.depth_errors(self.vision_tower.depth)
        if errors:
            raise ConfigError(errors)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.hidden_size)
        self.image_projection = nn.Linear(self.vision_tower.width, config.hidden_size)
        self.modality_embedding = nn.Embedding(2, config.hidden_size)
        self.fusion = FusionEncoder(config, config.text_config.hidden_size, self.vision_tower.width)
        self.text_pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.image_pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding."""
        return self.text_tower.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embedding."""
        self.text_tower.set_input_embeddings(value)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids and attention_mask [B, T] -> the text tower's top states [B, n, T, W]."""
        num_states = self.config.num_tower_states
        out = self.text_tower(input_ids, attention_mask, output_hidden_states=num_states > 1)
        return torch.stack(out.hidden_states[-num_states:] if num_states > 1 else [out.last_hidden_state], dim=1)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S] -> the image tower's top states [B, n, V, W]."""
        return self.vision_tower(pixel_values.to(self.dtype))

    def fuse(
        self, text_states: Tensor, image_states: Tensor, attention_mask: Tensor, image_shift: Tensor | None = None
    ) -> FusionOutput:
        """Run the cross-modal encoder.

        Args:
            text_states: of the tower, [B, n, T, W].
            image_states: the same, [B, n, V, W].
            attention_mask: [B, T], 1 where a token is real.
            image_shift: added to the images' modality embedding, [B, D]: distinguishes several images of a sample.
        """
        num_inputs = self.config.num_hidden_layers if self.config.bridge else 1
        kinds = torch.arange(2, device=text_states.device)
        text_kind, image_kind = self.modality_embedding(kinds)
        if image_shift is not None:
            image_kind = (image_kind + image_shift)[:, None, None]
        text = self.text_projection(text_states[:, -num_inputs:]) + text_kind
        image = self.image_projection(image_states[:, -num_inputs:]) + image_kind
        return self.fusion(text, image, text_states, image_states, attention_mask.bool())

    def pool(self, fused: FusionOutput) -> Tensor:
        """tanh of linear maps of both streams' first tokens, [B, 2 D]."""
        text = self.text_pooler(fused.text[:, 0])
        image = self.image_pooler(fused.image[:, 0])
        return torch.cat([text, image], dim=-1).tanh()

    def use_attention_kernel(self, impl: str | None) -> None:
        """Run all cross-layer attention by one implementation; see `cross_layer_attention` for their names."""
        for module in self.modules():
            if isinstance(module, CrossLayerAttention):
                module.impl = impl

    def compile_towers(self) -> None:
        """Compile both towers in place with ``torch.compile``; parameters keep their names."""
        self.text_tower.compile()
        self.vision_tower.compile()

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, output_gates: bool = False
    ) -> Unimo3ModelOutput:
        """Fuse texts [B, T] with images [B, 3, S, S]; attention_mask [B, T] is 1 where a token is real."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        fused = self.fuse(self.encode_text(input_ids, attention_mask), self.encode_image(pixel_values), attention_mask)
        return Unimo3ModelOutput(
            text_features=fused.text,
            image_features=fused.image,
            pooler_output=self.pool(fused),
            text_gates=fused.text_gates if output_gates else None,
            image_gates=fused.image_gates if output_gates else None,
        )


class Unimo3ForPreTraining(Unimo3PreTrainedModel):
    """The model with its masked-language, matching and contrastive heads."""

    def __init__(self, config: Unimo3Config):
        super().__init__(config)
        self.unimo3 = Unimo3Model(config)
        self.mlm_head = MlmHead(config)
        self.itm_head = ItmHead(config)
        self.itc_head = ItcHead(config, self.unimo3.vision_tower.width)
        # Families of text towers name the word embedding differently.
        words = self.unimo3.get_input_embeddings().weight
        (name,) = (name for name, parameter in self.named_parameters() if parameter is words)
        self._tied_weights_keys = {"mlm_head.decoder.weight": name}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The MLM decoder."""
        return self.mlm_head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the MLM decoder."""
        self.mlm_head.decoder = value

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, output_gates: bool = False
    ) -> Unimo3PreTrainingOutput:
        """Score texts [B, T] against images [B, 3, S, S] with every head."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        text = self.unimo3.encode_text(input_ids, attention_mask)
        image = self.unimo3.encode_image(pixel_values)
        fused = self.unimo3.fuse(text, image, attention_mask)
        contrast: ItcOutput = self.itc_head(text, image)
        return Unimo3PreTrainingOutput(
            prediction_logits=self.mlm_head(fused.text),
            matching_logits=self.itm_head(self.unimo3.pool(fused)),
            logits_per_image=contrast.image @ contrast.text.T / contrast.temperature,
            text_gates=fused.text_gates if output_gates else None,
            image_gates=fused.image_gates if output_gates else None,
        )


AutoConfig.register(Unimo3Config.model_type, Unimo3Config)
AutoModel.register(Unimo3Config, Unimo3Model)
AutoModelForPreTraining.register(Unimo3Config, Unimo3ForPreTraining)
