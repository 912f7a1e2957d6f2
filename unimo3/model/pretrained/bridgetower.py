"""BridgeTower's weights for the complete model: towers, bridges, fusion encoder, poolers, MLM and ITM heads.

BridgeTower is ``interaction: in_layer`` with ``bridge: true``; a test compares the two. With ``cross_layer`` the
gates start fresh. Its contrastive heads read fused states and have no counterpart here.

Source: BridgeTower, arXiv 2206.08657; transformers' modeling_bridgetower.py for the names.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import BridgeTowerConfig, PreTrainedConfig, PreTrainedModel, RobertaConfig

from unimo3.errors import CheckpointError, ConfigError
from unimo3.model.config import Unimo3Config, Unimo3VisionConfig
from unimo3.model.pretrained.fill import (
    NamedTensors,
    Rename,
    fill,
    read_config,
    read_names,
    read_shapes,
    read_tensors,
    without_values,
)
from unimo3.model.pretrained.vision import position_fitter
from unimo3.model.unimo3 import Unimo3ForPreTraining, Unimo3Model

# The architecture whose blocks are BridgeTower's; every size of it is overridden.
_ARCHITECTURE = "vit_base_patch16_clip_quickgelu_224"
_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_UNUSED = (
    r"^(bridgetower\.)?(text_model\.pooler\.|text_model\.embeddings\.(position_ids|token_type_ids)$"
    r"|vision_model\.visual\.(ln_separate\.|embeddings\.position_ids$))|^itc_\w+_head\.|^logit_scale$"
)
_HEADS = (
    Rename(r"^mlm_score\.transform\.dense\.", "mlm_head.dense."),
    Rename(r"^mlm_score\.transform\.LayerNorm\.", "mlm_head.norm."),
    Rename(r"^mlm_score\.decoder\.", "mlm_head.decoder."),
    Rename(r"^mlm_score\.bias$", "mlm_head.decoder.bias"),
    Rename(r"^itm_score\.fc\.", "itm_head.classifier."),
)


def _base_names(prefix: str) -> list[Rename]:
    """BridgeTowerModel's names -> Unimo3Model's; `prefix` comes before the latter."""
    start, vision = r"^(?:bridgetower\.)?", r"^(?:bridgetower\.)?vision_model\.visual\."
    block, ours = vision + r"transformer\.resblocks\.(\d+)\.", prefix + "vision_tower.vit."
    names = [
        Rename(start + r"text_model\.", prefix + "text_tower."),
        Rename(vision + r"embeddings\.class_embedding$", ours + "cls_token"),
        Rename(vision + r"embeddings\.patch_embedding\.", ours + "patch_embed.proj."),
        Rename(vision + r"embeddings\.position_embedding\.weight$", ours + "pos_embed"),
        Rename(vision + r"ln_pre\.", ours + "norm_pre."),
        Rename(vision + r"ln_post\.", ours + "norm."),
        Rename(block + r"attn\.in_proj_", ours + r"blocks.\1.attn.qkv."),
        Rename(block + r"attn\.out_proj\.", ours + r"blocks.\1.attn.proj."),
        Rename(block + r"ln_(\d)\.", ours + r"blocks.\1.norm\2."),
        Rename(block + r"mlp\.c_fc\.", ours + r"blocks.\1.mlp.fc1."),
        Rename(block + r"mlp\.c_proj\.", ours + r"blocks.\1.mlp.fc2."),
        Rename(start + r"token_type_embeddings\.", prefix + "modality_embedding."),
        Rename(start + r"cross_modal_(text|image)_transform\.", prefix + r"\1_projection."),
        Rename(start + r"cross_modal_(text|image)_pooler\.dense\.", prefix + r"\1_pooler."),
        Rename(start + r"cross_modal_(text|image)_layernorm\.", prefix + r"fusion.\1.bridge_norms.0."),
        Rename(start + r"cross_modal_(text|image)_link_tower\.(\d+)\.LayerNorm\.", _norm_behind(prefix)),
    ]
    layer, ours = start + r"cross_modal_(text|image)_layers\.(\d+)\.", prefix + r"fusion.\1.layers.\2."
    for part, name in enumerate(("query", "key", "value")):
        names.append(Rename(layer + rf"attention\.self\.{name}\.", ours + "self_attention.qkv.", part, 3))
    for part, name in enumerate(("key", "value")):
        names.append(
            Rename(layer + rf"crossattention\.self\.{name}\.", ours + "partner_key_value.projection.", part, 2)
        )
    return [
        *names,
        Rename(layer + r"attention\.output\.dense\.", ours + "self_attention.out."),
        Rename(layer + r"attention\.output\.LayerNorm\.", ours + "self_attention.norm."),
        Rename(layer + r"crossattention\.self\.query\.", ours + "cross_attention.query."),
        Rename(layer + r"crossattention\.output\.dense\.", ours + "cross_attention.out."),
        Rename(layer + r"crossattention\.output\.LayerNorm\.", ours + "cross_attention.norm."),
        Rename(layer + r"intermediate\.dense\.", ours + "feed_forward.inner."),
        Rename(layer + r"output\.dense\.", ours + "feed_forward.outer."),
        Rename(layer + r"output\.LayerNorm\.", ours + "feed_forward.norm."),
    ]


def _norm_behind(prefix: str) -> Any:
    # BridgeTower counts from the second layer on.
    return lambda match: f"{prefix}fusion.{match[1]}.bridge_norms.{int(match[2]) + 1}."


def bridgetower_config(theirs: PreTrainedConfig, image_size: int | None = None) -> Unimo3Config:
    """The configuration under which this project's model is that BridgeTower.

    Args:
        image_size: pixels a side; the BridgeTower's if None. Position tables are resized to it.

    Raises:
        ConfigError: it has a form that this model does not; every such field is named.
    """
    if not isinstance(theirs, BridgeTowerConfig):
        raise ConfigError(f"contains a '{theirs.model_type}' model; a BridgeTower one is needed")
    # transformers' annotation is wider than what its constructor sets.
    text: Any = theirs.text_config
    vision: Any = theirs.vision_config
    needed: list[tuple[str, Any, Any]] = [
        ("link_tower_type", theirs.link_tower_type, "add"),
        ("share_link_tower_layers", theirs.share_link_tower_layers, False),
        ("share_cross_modal_transformer_layers", theirs.share_cross_modal_transformer_layers, True),
        ("hidden_act", theirs.hidden_act, "gelu"),
        ("text_config.hidden_size", text.hidden_size, theirs.hidden_size),
        ("text_config.hidden_act", text.hidden_act, "gelu"),
        ("text_config.layer_norm_eps", text.layer_norm_eps, theirs.layer_norm_eps),
        ("vision_config.layer_norm_eps", vision.layer_norm_eps, 1e-5),
        ("vision_config.num_channels", vision.num_channels, 3),
    ]
    depth = vision.num_hidden_layers - bool(vision.remove_last_layer)
    errors = [
        f"its {field} is {value!r}; only {supported!r} is supported"
        for field, value, supported in needed
        if value != supported
    ]
    if depth < text.num_hidden_layers:
        errors.append(
            f"its vision_config.num_hidden_layers is {depth}, fewer than the text tower's {text.num_hidden_layers}; "
            "use another BridgeTower"
        )
    if errors:
        raise ConfigError(errors)
    return Unimo3Config(
        text_config=RobertaConfig(**{field: getattr(text, field) for field in _TEXT_FIELDS}),
        vision_config=Unimo3VisionConfig(
            _ARCHITECTURE,
            image_size or vision.image_size,
            {
                "patch_size": vision.patch_size,
                "embed_dim": vision.hidden_size,
                # BridgeTower runs as many blocks as the text tower has layers.
                "depth": text.num_hidden_layers,
                "num_heads": vision.hidden_size // 64,
            },
        ),
        hidden_size=theirs.hidden_size,
        num_hidden_layers=theirs.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        intermediate_size=text.intermediate_size,
        interaction="in_layer",
        bridge=True,
        hidden_dropout_prob=text.hidden_dropout_prob,
        attention_probs_dropout_prob=text.attention_probs_dropout_prob,
        layer_norm_eps=theirs.layer_norm_eps,
        tie_word_embeddings=theirs.tie_word_embeddings,
    )


def read_bridgetower_config(folder: str, image_size: int | None = None) -> Unimo3Config:
    """The same from a folder.

    Raises:
        ConfigError: the folder is missing, contains another model or a form that is not supported.
    """
    try:
        return bridgetower_config(read_config("model.init", folder, "BridgeTower"), image_size)
    except ConfigError as error:
        prefix = f"model.init: '{folder}': "
        raise ConfigError([line if line.startswith("model.init") else prefix + line for line in error.errors]) from None


def load_bridgetower(path_or_model: str | Path | PreTrainedModel, image_size: int | None = None) -> Unimo3Model:
    """This project's model with a BridgeTower's weights and outputs, in evaluation mode.

    Args:
        path_or_model: a local Hugging Face folder, or transformers' `BridgeTowerModel` or a class around it.
        image_size: pixels a side; the BridgeTower's if None.

    Raises:
        ConfigError: see `read_bridgetower_config`.
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    if isinstance(path_or_model, PreTrainedModel):
        model = Unimo3Model(bridgetower_config(path_or_model.config, image_size))
        tensors: Any = path_or_model.state_dict().items()
    else:
        model = Unimo3Model(read_bridgetower_config(str(path_or_model), image_size))
        tensors = read_tensors(Path(path_or_model))
    source = path_or_model.name_or_path if isinstance(path_or_model, PreTrainedModel) else str(path_or_model)
    fill(
        model,
        tensors,
        source or "the BridgeTower model",
        _base_names(""),
        f"{_UNUSED}|^(mlm|itm)_score\\.|{_blocks_from(model)}",
        adapt=position_fitter(model.vision_tower),
    )
    return model.eval()


def bridgetower_errors(folder: str, config: Unimo3Config) -> list[str]:
    """Return why a folder's weights do not fit a model of that configuration, by the files' headers alone."""
    try:
        with torch.device("meta"):
            model = Unimo3ForPreTraining(config)
        _fill(model, folder, without_values(read_shapes(Path(folder))))
    except CheckpointError as error:
        return [str(error)]
    return []


def fill_from_bridgetower(model: Unimo3ForPreTraining, folder: str) -> None:
    """Fill a pretraining model, sharded or not, from a BridgeTower folder; what BridgeTower lacks keeps its values.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    _fill(model, folder, read_tensors(Path(folder)))


def _fill(model: Unimo3ForPreTraining, folder: str, tensors: NamedTensors) -> None:
    base: Unimo3Model = model.unimo3
    names = read_names(Path(folder))
    heads = [r"^itc_head\."]
    for ours, theirs in ((r"^mlm_head\.", "mlm_score."), (r"^itm_head\.", "itm_score.")):
        if not any(name.startswith(theirs) for name in names):
            heads.append(ours)
    fill(
        model,
        tensors,
        f"model.init: '{folder}'",
        [*_HEADS, *_base_names("unimo3.")],
        f"{_UNUSED}|{_blocks_from(base)}",
        fresh="|".join([r"\.gate\.", r"\.tower_key_values\.", *heads]),
        adapt=position_fitter(base.vision_tower),
    )


def _blocks_from(model: Unimo3Model) -> str:
    """Pattern of the image blocks after those that BridgeTower runs."""
    depth = model.vision_tower.depth
    return rf"vision_model\.visual\.transformer\.resblocks\.(?!({'|'.join(map(str, range(depth)))})\.)"
