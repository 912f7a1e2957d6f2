"""Assembly of the UNIMO-3 model behind the Hugging Face conventions.

Source: arXiv 2305.13697; transformers' PreTrainedModel for saving, loading and tying.
"""

# Shapes: B batch, T text tokens, V image tokens, D fusion width, H heads, S visible levels.

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, RobertaModel
from transformers.utils import ModelOutput

from unimo3.errors import ConfigError
from unimo3.model.config import Unimo3Config
from unimo3.model.fusion import FusionEncoder, FusionOutput
from unimo3.model.heads import ItcHead, ItcOutput, ItmHead, MlmHead, VqaHead
from unimo3.model.init import initialize_module
from unimo3.model.vision import VisionTower


@dataclass
class Unimo3ModelOutput(ModelOutput):
    """Fused states.

    Attributes:
        text_features: [B, T, D].
        image_features: [B, V, D].
        pooler_output: [B, 2 D], both class tokens.
        text_gates: on request, one [B, T, H, S] tensor for each layer (None where a layer sees one level).
        image_gates: likewise, [B, V, H, S].
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
    """

    prediction_logits: Tensor | None = None
    matching_logits: Tensor | None = None
    logits_per_image: Tensor | None = None


@dataclass
class Unimo3AnswerOutput(ModelOutput):
    """`logits`: [B, answers], before the sigmoid."""

    logits: Tensor | None = None


class Unimo3PreTrainedModel(PreTrainedModel):
    """What all UNIMO-3 models share."""

    config_class = Unimo3Config
    base_model_prefix = "unimo3"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["StreamLayer", "RobertaLayer", "Block"]

    def __init__(self, config: Unimo3Config):
        faults = config.faults()
        if faults:
            raise ConfigError(faults)
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        initialize_module(module, self.config.initializer_range)


class Unimo3Model(Unimo3PreTrainedModel):
    """Towers and fusion encoder, without a head."""

    _keys_to_ignore_on_load_unexpected = [r"^(mlm|itm|itc|vqa)_head\."]

    def __init__(self, config: Unimo3Config):
        super().__init__(config)
        self.text_tower = RobertaModel(config.text_config, add_pooling_layer=False)
        self.vision_tower = VisionTower(config.vision_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.hidden_size)
        self.image_projection = nn.Linear(self.vision_tower.width, config.hidden_size)
        self.modality_embedding = nn.Embedding(2, config.hidden_size)
        self.fusion = FusionEncoder(config)
        self.text_pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.image_pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding."""
        return self.text_tower.get_input_embeddings()

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids and attention_mask [B, T] -> the text tower's last states [B, T, width]."""
        return self.text_tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S] -> the image tower's last states [B, V, width]."""
        return self.vision_tower(pixel_values.to(self.dtype))

    def fuse(self, text_states: Tensor, image_states: Tensor, attention_mask: Tensor) -> FusionOutput:
        """Run the cross-modal encoder on tower states [B, T, width], [B, V, width]; attention_mask [B, T]."""
        kinds = torch.arange(2, device=text_states.device)
        text_kind, image_kind = self.modality_embedding(kinds)
        text = self.text_projection(text_states) + text_kind
        image = self.image_projection(image_states) + image_kind
        return self.fusion(text, image, attention_mask.bool())

    def pool(self, fused: FusionOutput) -> Tensor:
        """[tanh(W x_CLS); tanh(W y_CLS)], [B, 2 D]."""
        text = self.text_pooler(fused.text[:, 0])
        image = self.image_pooler(fused.image[:, 0])
        return torch.cat([text, image], dim=-1).tanh()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        output_gates: bool = False,
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

    _tied_weights_keys = {"mlm_head.decoder.weight": "unimo3.text_tower.embeddings.word_embeddings.weight"}

    def __init__(self, config: Unimo3Config):
        super().__init__(config)
        self.unimo3 = Unimo3Model(config)
        self.mlm_head = MlmHead(config)
        self.itm_head = ItmHead(config)
        self.itc_head = ItcHead(config, self.unimo3.vision_tower.width)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The MLM decoder."""
        return self.mlm_head.decoder

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None
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
        )


class Unimo3ForVisualQuestionAnswering(Unimo3PreTrainedModel):
    """The model with a classifier over an answer vocabulary."""

    _keys_to_ignore_on_load_unexpected = [r"^(mlm|itm|itc)_head\."]

    def __init__(self, config: Unimo3Config):
        super().__init__(config)
        if config.num_answers < 1:
            raise ConfigError(f"num_answers: {config.num_answers}: at least one answer is needed to build this head")
        self.unimo3 = Unimo3Model(config)
        self.vqa_head = VqaHead(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None
    ) -> Unimo3AnswerOutput:
        """Score every answer to questions [B, T] about images [B, 3, S, S]."""
        fused = self.unimo3(input_ids, pixel_values, attention_mask)
        return Unimo3AnswerOutput(logits=self.vqa_head(fused.pooler_output))


AutoConfig.register(Unimo3Config.model_type, Unimo3Config)
AutoModel.register(Unimo3Config, Unimo3Model)
