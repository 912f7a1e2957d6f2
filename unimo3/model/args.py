"""Settings of the model, as recipes give them, and their way to a `Unimo3Config`.

Source: RoBERTa, arXiv 1907.11692, and CLIP, arXiv 2103.00020, for the towers' default sizes.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from unimo3.config import Checked
from unimo3.errors import ConfigError

if TYPE_CHECKING:
    from unimo3.model.config import TextConfig, Unimo3Config, Unimo3VisionConfig
    from unimo3.model.unimo3 import Unimo3ForPreTraining

Interaction = Literal["in_layer", "cross_layer"]
Gate = Literal["token", "static", "uniform"]
INTERACTIONS, GATES = get_args(Interaction), get_args(Gate)
TEMPERATURE_BOUNDS = (0.001, 0.5)
"""Bounds of the contrastive temperature."""
PRETRAINING_HEADS = r"^(mlm|itm|itc)_head\."
"""Pattern of the parameters that only pretraining's objectives use."""
_DECIDED_BY_WEIGHTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "interaction",
    "unimodal_levels",
    "bridge",
    "gate",
    "itc_size",
    "tie_word_embeddings",
)
# Of RoBERTas, and of ModernBERT.
_TEXT_DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("embedding_dropout", "attention_dropout", "mlp_dropout"),
)
_COUNTS = ("hidden_size", "num_attention_heads", "itc_size")
_TEXT_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class TextArgs:
    """The text tower, a RoBERTa encoder unless `init` names another family."""

    init: str | None = None
    """Local Hugging Face folder of a RoBERTa, XLM-RoBERTa or ModernBERT: its weights, and its sizes instead of those
    below. Random if null."""
    vocab_size: int = 50265
    """Entries of the word embedding; at least the tokenizer's."""
    hidden_size: int = 768
    """Width."""
    num_hidden_layers: int = 12
    """Layers."""
    num_attention_heads: int = 12
    """Attention heads."""
    intermediate_size: int = 3072
    """Inner width of the feed-forward networks."""
    max_position_embeddings: int = 514
    """Rows of the position table. Positions are counted from behind the tokenizer's padding id, which is 1 in
    RoBERTa's: texts have at most two tokens fewer."""
    dropout: float = 0.1
    """Dropout probability of hidden states and attention weights."""

    def to_config(self) -> "TextConfig":
        """The tower's configuration."""
        if self.init:
            from unimo3.model.pretrained import read_text_config

            config = read_text_config(self.init)
            set_text_dropout(config, self.dropout)
            return config
        from transformers import RobertaConfig

        return RobertaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )


@dataclass(frozen=True)
class VisionArgs:
    """The image tower, a timm vision transformer."""

    init: str | None = None
    """Local Hugging Face folder of a CLIP, a SigLIP or a DINOv2 (with or without registers), whose activation is used,
    or a timm checkpoint file; with this tower's sizes. Random if null."""
    architecture: str = "vit_base_patch16_clip_quickgelu_224"
    """Name of a timm vision transformer."""
    image_size: int = 288
    """Height and width of the input in pixels, a multiple of the patch size."""
    patch_size: int = 0
    """Patch height and width in pixels; 0: the architecture's default."""
    width: int = 0
    """Width; 0: the architecture's default."""
    depth: int = 0
    """Layers; 0: the architecture's default."""
    num_heads: int = 0
    """Attention heads; 0: the architecture's default."""

    def to_config(self) -> "Unimo3VisionConfig":
        """The tower's configuration."""
        from unimo3.model.config import Unimo3VisionConfig

        sizes: dict[str, Any] = {
            "patch_size": self.patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.num_heads,
        }
        overrides = {name: value for name, value in sizes.items() if value}
        if self.init:
            from unimo3.model.pretrained import vision_activation

            overrides |= vision_activation(self.init)
        return Unimo3VisionConfig(self.architecture, self.image_size, overrides)


@dataclass(frozen=True)
class ModelArgs(Checked):
    """Towers and cross-modal encoder."""

    text: TextArgs = field(default_factory=TextArgs)
    vision: VisionArgs = field(default_factory=VisionArgs)
    init: str | None = None
    """Weights of the complete model. A run, one of its checkpoints, or an export: all of its model is used, except the
    image size and dropout. Or a local Hugging Face BridgeTower folder: its sizes and tying replace those of towers and
    fusion, except the image size; needs `bridge`; gates and other parts that BridgeTower lacks start random."""
    hidden_size: int = 768
    """Fusion width D."""
    num_hidden_layers: int = 6
    """Fusion layers L."""
    num_attention_heads: int = 12
    """Fusion attention heads H."""
    interaction: Interaction = "cross_layer"
    """What a fusion layer reads of the other modality: its partner layer, or every level up to it."""
    unimodal_levels: int = 0
    """Top layers of the other modality's tower that join the levels of `cross_layer`."""
    bridge: bool = True
    """Whether each fusion layer's input is joined by a tower layer's states, as in BridgeTower."""
    gate: Gate = "token"
    """How levels are weighed: by each token and head, by a learned constant a head, or equally."""
    gate_init: float = 0.9
    """Weight of the in-layer level at the start, between 0 and 1."""
    dropout: float = 0.1
    """Dropout probability of the fusion layers' hidden states and attention weights."""
    initializer_range: float = 0.02
    """Standard deviation of random initial weights; narrow models learn faster from about 1 / sqrt(width)."""
    itc_size: int = 256
    """Width of the contrastive projections."""
    itc_temperature_init: float = 0.07
    """Contrastive temperature at the start; it is learned within 0.001 and 0.5."""
    tie_word_embeddings: bool = True
    """Whether the MLM decoder shares the word embedding; the text and fusion widths must then be equal."""

    has_weights: ClassVar[bool] = True
    """Whether there are weights next to the configuration that `init` names."""

    @property
    def continues_unimo3(self) -> bool:
        """Whether `init` names a model of this project, by its configuration."""
        return bool(self.init) and _model_type(self.init or "") == "unimo3"

    def to_config(self) -> "Unimo3Config":
        """The model's configuration.

        Raises:
            ConfigError: `text.init` is no text encoder's folder, or `init` neither a BridgeTower nor an exported one.
        """
        if self.init and self.continues_unimo3:
            from unimo3.model.pretrained import read_exported_config

            config = read_exported_config(self.init, self.has_weights, "model.init")
            config.vision_config.image_size = self.vision.image_size
            config.update({"hidden_dropout_prob": self.dropout, "attention_probs_dropout_prob": self.dropout})
            set_text_dropout(config.text_config, self.text.dropout)
            return config
        if self.init and not (Path(self.init) / "config.json").is_file():
            raise ConfigError(
                f"model.init: '{self.init}': no config.json there; name a run, one of its checkpoints, an exported "
                "folder, or a local Hugging Face BridgeTower folder"
            )
        if self.init:
            from unimo3.model.pretrained import read_bridgetower_config

            config = read_bridgetower_config(self.init, self.vision.image_size)
            config.update(self._free_settings())
            set_text_dropout(config.text_config, self.text.dropout)
            return config
        from unimo3.model.config import Unimo3Config

        return Unimo3Config(
            text_config=self.text.to_config(),
            vision_config=self.vision.to_config(),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            tie_word_embeddings=self.tie_word_embeddings,
            **self._free_settings(),
        )

    def _free_settings(self) -> dict[str, Any]:
        """Settings that other models' weights do not decide."""
        return {
            "interaction": self.interaction,
            "gate": self.gate,
            "gate_init": self.gate_init,
            "unimodal_levels": self.unimodal_levels,
            "bridge": self.bridge,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
            "initializer_range": self.initializer_range,
            "itc_size": self.itc_size,
            "itc_temperature_init": self.itc_temperature_init,
        }

    def quick_errors(self) -> list[str]:
        """Return the errors that are found without a model, one line each: field, value and fix."""
        errors = self._range_errors() + self._init_errors()
        if self.init:
            return errors  # the sizes are those of its weights
        if not self.text.init:
            errors += text_errors(self.text)
        vision = self.vision
        return errors + image_errors(vision.architecture, vision.image_size, vision.patch_size) + fusion_errors(self)

    def slow_errors(self) -> list[str]:
        """Return where the model cannot be built, one line per error: field, value and fix."""
        try:
            config = self.to_config()
        except ConfigError as error:  # of the text tower, whose files may be missing
            vision = self.vision.to_config()
            return error.errors + (vision.validate() or self._tower_errors(vision))
        errors = config.validate()
        text_width, width = config.text_config.hidden_size, config.hidden_size
        if config.tie_word_embeddings and text_width != width and min(text_width, width) > 0:
            errors.append(
                f"model.tie_word_embeddings: true: the text width {text_width} is not the fusion width "
                f"{width}; make them equal or set it to false"
            )
        return errors or self._built_errors(config)

    def _tower_errors(self, vision: "Unimo3VisionConfig", config: "Unimo3Config | None" = None) -> list[str]:
        """Return whether timm builds the image tower, and whether the depth of `config` and ``vision.init`` fit it."""
        import torch

        from unimo3.model.pretrained import vision_errors
        from unimo3.model.vision import VisionTower

        try:
            with torch.device("meta"):
                tower = VisionTower(vision)
                tower(torch.empty(1, 3, vision.image_size, vision.image_size))
        except ConfigError as error:
            return error.errors
        except Exception as error:  # timm raises many types for sizes that do not fit together
            return [f"model.vision: {self.vision}: timm cannot build such a vision transformer ({error})"]
        errors = config.depth_errors(tower.depth) if config is not None else []
        return errors + (vision_errors(self.vision.init, tower) if self.vision.init else [])

    def _built_errors(self, config: "Unimo3Config") -> list[str]:
        """Return whether the model can be built, and whether the weights fit that are named for it or its towers."""
        from unimo3.model.pretrained import bridgetower_errors, exported_errors, text_weight_errors
        from unimo3.model.unimo3 import Unimo3ForPreTraining

        errors = self._tower_errors(config.vision_config, config)
        if self.text.init:
            errors += text_weight_errors(self.text.init, config.text_config)
        if self.init and not errors:
            if not self.continues_unimo3:
                errors += bridgetower_errors(self.init, config) if self.has_weights else []
            elif other := [name for name in config.architectures or () if name != Unimo3ForPreTraining.__name__]:
                errors.append(
                    f"model.init: '{self.init}': contains weights of {other[0]}, without pretraining's heads; name "
                    "pretraining's weights"
                )
            elif self.has_weights:
                errors += exported_errors(self.init, Unimo3ForPreTraining, config, fresh=r"^$", field="model.init")
        return errors

    def _init_errors(self) -> list[str]:
        if not self.init:
            return []
        errors = [
            f"model.{name}.init: '{path}': model.init already gives the complete model's weights; name one of the two"
            for name, path in (("text", self.text.init), ("vision", self.vision.init))
            if path
        ]
        if not self.bridge and not self.continues_unimo3:
            errors.append("model.bridge: false: model.init is a BridgeTower, whose layers have bridges; set it to true")
        return errors

    def _range_errors(self) -> list[str]:
        least_1 = [(f"model.{name}", getattr(self, name)) for name in _COUNTS]
        least_1 += [(f"model.text.{name}", getattr(self.text, name)) for name in _TEXT_COUNTS]
        least_1 += [("model.vision.image_size", self.vision.image_size)]
        errors = [f"{name}: {value}: at least 1 is needed" for name, value in least_1 if value < 1]
        for name in ("patch_size", "width", "depth", "num_heads"):
            if getattr(self.vision, name) < 0:
                errors.append(
                    f"model.vision.{name}: {getattr(self.vision, name)}: a number above 0, or 0 for the architecture's "
                    "default, is needed"
                )
        if self.initializer_range <= 0:
            errors.append(f"model.initializer_range: {self.initializer_range}: a number above 0 is needed")
        if not TEMPERATURE_BOUNDS[0] <= self.itc_temperature_init <= TEMPERATURE_BOUNDS[1]:
            errors.append(
                f"model.itc_temperature_init: {self.itc_temperature_init}: must lie within {TEMPERATURE_BOUNDS[0]} and "
                f"{TEMPERATURE_BOUNDS[1]}"
            )
        for name, value in (("model.dropout", self.dropout), ("model.text.dropout", self.text.dropout)):
            if not 0 <= value < 1:
                errors.append(f"{name}: {value}: a probability of at least 0 and below 1 is needed")
        return errors


@dataclass(frozen=True)
class ModelOfRun(ModelArgs):
    """A model whose `init` has the configuration and no weights, such as a run's ``model``."""

    has_weights: ClassVar[bool] = False


def replaced_errors(args: ModelArgs, config: "Unimo3Config") -> list[str]:
    """Return which settings have no effect, since the weights of `init` decide them, one line per error.

    Args:
        args: settings; those that have their default's value are not compared.
        config: of the weights.
    """
    text, vision = config.text_config, config.vision_config
    sizes = {"patch_size": "patch_size", "width": "embed_dim", "depth": "depth", "num_heads": "num_heads"}
    groups: list[tuple[str, Any, dict[str, Any]]] = [
        ("model", args, {name: getattr(config, name) for name in _DECIDED_BY_WEIGHTS}),
        ("model.text", args.text, {name: getattr(text, name) for name in _TEXT_COUNTS}),
        ("model.vision", args.vision, {"architecture": vision.architecture}),
        ("model.vision", args.vision, {ours: vision.overrides.get(theirs, 0) for ours, theirs in sizes.items()}),
    ]
    return [
        f"{group}.{name}: {value}: the weights of model.init have {theirs}; leave it out"
        for group, settings, values in groups
        for name, theirs in values.items()
        if (value := getattr(settings, name)) not in (theirs, getattr(type(settings)(), name))
    ]


def _model_type(folder: str) -> str:
    """The ``model_type`` of a folder's config.json; empty if there is none that can be read."""
    try:
        content = json.loads((Path(folder) / "config.json").read_bytes())
    except (OSError, ValueError):
        return ""
    return str(content.get("model_type", "")) if isinstance(content, dict) else ""


def set_text_dropout(text: "TextConfig", probability: float) -> None:
    """Set the dropout of a text tower's hidden states and attention weights; families name them differently."""
    for name in _TEXT_DROPOUTS:
        if hasattr(text, name):
            setattr(text, name, probability)


def text_errors(text: "TextArgs | TextConfig") -> list[str]:
    """Return an error if a text tower's width does not divide into its heads."""
    heads = text.num_attention_heads
    if heads > 0 and text.hidden_size % heads:
        return [f"model.text.num_attention_heads: {heads}: must divide {text.hidden_size}"]
    return []


def image_errors(architecture: str, size: int, patch: int) -> list[str]:
    """Return an error if an image does not divide into patches.

    Args:
        size: of the image's side, in pixels; `ModelArgs` reports numbers below 1, of the patch too.
        patch: of the patch's side; 0: as the architecture's name states it.
    """
    stated = (part.removeprefix("patch") for part in architecture.split("_") if part.startswith("patch"))
    patch = patch or next((int(number) for number in stated if number.isdigit()), 0)
    if patch <= 0 or size <= 0 or size % patch == 0:
        return []
    return [
        f"model.vision.image_size: {size}: not a multiple of the patch size {patch}; "
        f"use {size // patch * patch or patch} or {(size // patch + 1) * patch}"
    ]


def fusion_errors(model: "ModelArgs | Unimo3Config") -> list[str]:
    """Return the errors of a cross-modal encoder's settings, one line each: field, value and fix."""
    errors = []
    if model.num_attention_heads > 0 and model.hidden_size % model.num_attention_heads:
        errors.append(
            f"model.num_attention_heads: {model.num_attention_heads}: must divide model.hidden_size {model.hidden_size}"
        )
    if model.num_hidden_layers < 1:
        errors.append(f"model.num_hidden_layers: {model.num_hidden_layers}: at least one fusion layer is needed")
    if model.interaction not in INTERACTIONS:
        errors.append(f"model.interaction: '{model.interaction}': one of {', '.join(INTERACTIONS)} is supported")
    if model.gate not in GATES:
        errors.append(f"model.gate: '{model.gate}': one of {', '.join(GATES)} is supported")
    if not 0 < model.gate_init < 1:
        errors.append(f"model.gate_init: {model.gate_init}: a number strictly between 0 and 1 is needed")
    if model.unimodal_levels < 0:
        errors.append(f"model.unimodal_levels: {model.unimodal_levels}: 0 or a number of tower layers is needed")
    if model.unimodal_levels > 0 and model.interaction != "cross_layer":
        errors.append(
            f"model.unimodal_levels: {model.unimodal_levels}: {model.interaction} reads the partner layer alone; "
            "set it to 0, or model.interaction to cross_layer"
        )
    return errors


def set_initial_weights(model: "Unimo3ForPreTraining", args: ModelArgs, seed: int) -> None:
    """Give a new model, sharded by ZeRO-3 or not, the values that `args` names: random, then those of other models.

    Raises:
        CheckpointError: a tensor of a folder or file is missing, unexpected or of another shape.
    """
    from unimo3.model.initialization import initialize_weights
    from unimo3.model.pretrained import fill_from_bridgetower, load_exported, load_text, load_vision

    initialize_weights(model, seed, args.initializer_range)
    if args.init and args.continues_unimo3:
        load_exported(model, args.init, field="model.init")
    elif args.init:
        fill_from_bridgetower(model, args.init)
    if args.text.init:
        load_text(model.unimo3.text_tower, args.text.init)
    if args.vision.init:
        load_vision(model.unimo3.vision_tower, args.vision.init)
