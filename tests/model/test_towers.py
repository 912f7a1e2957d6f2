"""Towers equal transformers' and timm's models layer by layer, with weights of every form we read."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.beit import checkpoint_filter_fn
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)

from tests.model.tower_cases import ARCHITECTURE, DEPTH, SIZES, TEXT_SIZES, clip_vision, image_tower, spread, tower_of
from tests.tiny import tiny_batch, tiny_pretraining_model
from unimo3.model.args import ModelArgs, TextArgs, VisionArgs
from unimo3.model.config import Unimo3VisionConfig
from unimo3.model.downstream import Unimo3ForVisualQuestionAnswering
from unimo3.model.initialization import initialize_weights
from unimo3.model.pretrained import (
    load_exported,
    load_text,
    load_vision,
    read_exported_config,
    text_weight_errors,
    vision_errors,
)
from unimo3.model.text import build_text_tower
from unimo3.model.vision import VisionTower

# Of configurations, models and sizes; with a head the names of tensors have a prefix.
TEXT_FAMILIES = {
    "roberta": (RobertaConfig, RobertaForMaskedLM, {}),
    "xlm_roberta": (XLMRobertaConfig, XLMRobertaForMaskedLM, {}),
    "xlm_roberta_encoder": (XLMRobertaConfig, XLMRobertaModel, {}),
    "modernbert": (ModernBertConfig, ModernBertForMaskedLM, {"local_attention": 4}),
}


@torch.no_grad()
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_all_text_states_equal_transformers(tmp_path, family):
    config_class, model_class, changes = TEXT_FAMILIES[family]
    outside = spread(model_class(config_class(**TEXT_SIZES, **changes, num_hidden_layers=DEPTH)))
    outside.save_pretrained(tmp_path)
    text = TextArgs(init=str(tmp_path), dropout=0.0).to_config()
    vision = {"image_size": 16, "overrides": SIZES}
    model = tiny_pretraining_model(text_config=text, vision_config=vision, bridge=True).eval()
    assert text_weight_errors(str(tmp_path), text) == []
    load_text(model.unimo3.text_tower, str(tmp_path))
    batch = tiny_batch(3)
    inputs = batch["input_ids"], batch["attention_mask"]
    expected = AutoModel.from_pretrained(tmp_path).eval()(*inputs, output_hidden_states=True)
    actual = model.unimo3.encode_text(*inputs)
    assert actual.shape == (3, DEPTH, 10, 32)
    torch.testing.assert_close(actual, torch.stack(expected.hidden_states[1:], dim=1), atol=0, rtol=0)
    # With another head around it, and read by transformers.
    assert model.mlm_head.decoder.weight is model.unimo3.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    assert type(again.config.text_config) is config_class
    assert torch.equal(again.unimo3.encode_text(*inputs), actual)
    answering = read_exported_config(str(tmp_path / "saved"))
    answering.num_answers = 3
    tuned = Unimo3ForVisualQuestionAnswering(answering).eval()
    load_exported(tuned, str(tmp_path / "saved"), fresh=r"^vqa_head\.")
    assert torch.equal(tuned.unimo3.encode_text(*inputs), actual)


@torch.no_grad()
def test_a_cast_model_has_the_positions_of_a_modernbert(tmp_path):
    # A text of some length, where angles of rounded frequencies are wrong.
    sizes = TEXT_SIZES | {"max_position_embeddings": 128, "num_hidden_layers": 1}
    spread(ModernBertModel(ModernBertConfig(**sizes))).save_pretrained(tmp_path)
    tower = build_text_tower(TextArgs(init=str(tmp_path), dropout=0.0).to_config()).eval()
    load_text(tower, str(tmp_path))
    ids = torch.arange(128)[None] % 60
    expected = ModernBertModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()(ids).last_hidden_state
    assert torch.equal(tower.bfloat16()(ids).last_hidden_state, expected)


@torch.no_grad()
@pytest.mark.parametrize("has_text", [True, False], ids=["clip_model", "clip_vision_model"])
@pytest.mark.parametrize("image_size", [16, 24, 40])
def test_all_image_states_equal_clips_also_with_resized_positions(tmp_path, image_size, has_text):
    if has_text:
        text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        spread(
            CLIPModel(CLIPConfig(text_config=text, vision_config=clip_vision().to_dict(), projection_dim=16))
        ).save_pretrained(tmp_path)
    else:
        spread(CLIPVisionModel(clip_vision())).save_pretrained(tmp_path)
    outside = CLIPVisionModel.from_pretrained(tmp_path).eval()
    tower = image_tower(image_size, num_states=DEPTH)
    assert vision_errors(str(tmp_path), tower) == []
    load_vision(tower, str(tmp_path))
    pixels = torch.randn(2, 3, image_size, image_size)
    expected = outside(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    norm = outside.get_submodule(
        "vision_model.post_layernorm" if hasattr(outside, "vision_model") else "post_layernorm"
    )
    states = torch.stack([norm(state) for state in expected[1:]], dim=1)
    torch.testing.assert_close(tower(pixels), states, atol=1e-5, rtol=1e-5)
    # Before the final norm, and the embeddings too.
    entered, plain = [], []
    tower.vit.norm_pre.register_forward_hook(lambda *args: entered.append(args[2]))
    for block in tower.vit.blocks:
        block.register_forward_hook(lambda *args: plain.append(args[2]))
    tower(pixels)
    for actual, wanted in zip([*entered, *plain], expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


OUTSIDE_SIZES = {
    **{"hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "patch_size": 8, "image_size": 16},
}
SIGLIP = OUTSIDE_SIZES | {"intermediate_size": 128}
SIGLIP_TEXT = {
    **{"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    **{"bos_token_id": 0, "eos_token_id": 2},
}


# timm's architecture, and the model whose folder fills it.
HUGGING_FACE = {
    "siglip": (
        "vit_base_patch16_siglip_224",
        lambda: SiglipModel(SiglipConfig(vision_config=SIGLIP, text_config=SIGLIP_TEXT)),
    ),
    "siglip_vision": ("vit_base_patch16_siglip_224", lambda: SiglipVisionModel(SiglipVisionConfig(**SIGLIP))),
    "dinov2": ("vit_base_patch14_dinov2", lambda: Dinov2Model(Dinov2Config(**OUTSIDE_SIZES))),
    "dinov2_with_registers": (
        "vit_base_patch14_reg4_dinov2",
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**OUTSIDE_SIZES)),
    ),
    "dinov2_with_registers_classifier": (
        "vit_base_patch14_reg4_dinov2",
        lambda: Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**OUTSIDE_SIZES)),
    ),
    "dinov2_with_registers_swiglu": (
        "vit_giant_patch14_reg4_dinov2",
        lambda: Dinov2WithRegistersModel(
            # The ratio at which both give the feed-forward network the same width.
            Dinov2WithRegistersConfig(**OUTSIDE_SIZES, use_swiglu_ffn=True, mlp_ratio=4)
        ),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("image_size", [16, 40])
@pytest.mark.parametrize("family", HUGGING_FACE)
def test_all_image_states_equal_transformers(tmp_path, family, image_size):
    architecture, build = HUGGING_FACE[family]
    outside = spread(build())
    outside.save_pretrained(tmp_path)
    # As the settings give it: the activation is the folder's.
    args = VisionArgs(str(tmp_path), architecture, image_size, 8, 32, DEPTH, 2)
    config = args.to_config()
    if family.endswith("swiglu"):
        config.overrides["mlp_ratio"] = 5.5
    tower = VisionTower(config, DEPTH).eval()
    assert vision_errors(str(tmp_path), tower) == []
    load_vision(tower, str(tmp_path))
    pixels = torch.randn(2, 3, image_size, image_size)
    model = getattr(outside, "dinov2_with_registers", getattr(outside, "vision_model", outside))
    resized = {"interpolate_pos_encoding": True} if "siglip" in family else {}
    states = model(pixel_values=pixels, output_hidden_states=True, **resized).hidden_states[1:]
    norm = model.post_layernorm if "siglip" in family else model.layernorm
    num_prefix = {"siglip": 0, "siglip_vision": 0, "dinov2": 1}.get(family, 5)
    expected = []
    for state in map(norm, states):
        patches = state[:, num_prefix:]
        pooled = state[:, :1] if num_prefix else patches.mean(dim=1, keepdim=True)
        expected.append(torch.cat([pooled, patches], dim=1))
    actual = tower(pixels)
    assert actual.shape == (2, DEPTH, 1 + (image_size // 8) ** 2, 32) == (2, DEPTH, tower.num_tokens, 32)
    torch.testing.assert_close(actual, torch.stack(expected, dim=1), atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "num_registers", "has_class_token"),
    [
        ("vit_base_patch16_reg4_gap_256", 4, False),
        ("vit_base_patch16_siglip_gap_224", 0, False),
        ("vit_base_patch16_radio_v3", 7, True),
        ("aimv2_large_patch14_224", 0, False),
        ("vit_base_patch16_rope_reg1_gap_256", 1, False),
        ("vit_small_plus_patch16_dinov3", 4, True),
        ("vit_srelpos_small_patch16_224", 0, False),
    ],
)
def test_states_are_the_pooled_vector_and_the_patches_of_timm(tmp_path, architecture, num_registers, has_class_token):
    vision = {"architecture": architecture, "image_size": 32, "overrides": SIZES}
    text = TEXT_SIZES | {"num_hidden_layers": DEPTH}
    model = tiny_pretraining_model(vision_config=vision, text_config=text, bridge=True).eval()
    tower = model.unimo3.vision_tower
    assert (tower.num_registers, tower.has_class_token) == (num_registers, has_class_token)
    pixels = torch.randn(2, 3, 32, 32)
    tokens = tower.vit.forward_features(pixels)
    patches = tokens[:, num_registers + has_class_token :]
    pooled = tokens[:, :1] if has_class_token else patches.mean(dim=1, keepdim=True)
    states = model.unimo3.encode_image(pixels)
    torch.testing.assert_close(states[:, -1], torch.cat([pooled, patches], dim=1), atol=0, rtol=0)
    expected = torch.nn.functional.normalize(model.itc_head.image(pooled[:, 0]), dim=-1)
    torch.testing.assert_close(model.itc_head.embed_image(states), expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again.unimo3.encode_image(pixels), states)
    # Another resolution, as a second stage has it.
    config = read_exported_config(str(tmp_path))
    config.vision_config.image_size = 48
    larger = type(model)(config).eval()
    load_exported(larger, str(tmp_path))
    assert larger.unimo3.encode_image(torch.randn(1, 3, 48, 48)).shape == (1, DEPTH, 1 + 6 * 6, 32)
    assert model.to(torch.bfloat16).unimo3.encode_image(pixels).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("form", ["safetensors", "pth", "wrapped.pth"])
def test_a_timm_checkpoint_fills_the_image_tower(tmp_path, form):
    outside = spread(timm.create_model(ARCHITECTURE, img_size=16, num_classes=7, **SIZES))
    path = tmp_path / f"vit.{form}"
    state = {name: tensor.contiguous() for name, tensor in outside.state_dict().items()}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if form.startswith("wrapped") else state, path)
    tower = image_tower(16)
    assert vision_errors(str(path), tower) == []
    load_vision(tower, str(path))
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(tower(pixels)[:, -1], outside.forward_features(pixels), atol=1e-6, rtol=1e-6)


EVA_AND_BEIT = (
    "eva02_tiny_patch14_224",
    "eva_giant_patch14_clip_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "vit_small_patch16_rope_224",
)


@torch.no_grad()
@pytest.mark.parametrize("architecture", EVA_AND_BEIT)
def test_timms_evas_and_beits_are_image_towers(tmp_path, architecture):
    sizes = {"patch_size": 8, "width": 32, "depth": DEPTH, "num_heads": 2}
    text = TextArgs(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    vision = VisionArgs(architecture=architecture, image_size=16, **sizes)
    args = ModelArgs(text, vision, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    assert args.validate() == []
    outside = spread(timm.create_model(architecture, img_size=16, num_classes=7, global_pool="token", **SIZES))
    save_file(
        {name: tensor.contiguous() for name, tensor in outside.state_dict().items()}, tmp_path / "vit.safetensors"
    )
    tower = tower_of(architecture)
    assert vision_errors(str(tmp_path / "vit.safetensors"), tower) == []
    load_vision(tower, str(tmp_path / "vit.safetensors"))
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(tower(pixels)[:, -1], outside.forward_features(pixels), atol=1e-5, rtol=1e-5)
    # What no file has, such as rotary and relative positions, is there after from_pretrained.
    vision = {"architecture": architecture, "image_size": 16, "overrides": SIZES}
    model = tiny_pretraining_model(vision_config=vision).eval()
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again.unimo3.vision_tower(pixels), model.unimo3.vision_tower(pixels))
    buffers = dict(again.unimo3.vision_tower.named_buffers())
    for name, buffer in model.unimo3.vision_tower.named_buffers():
        assert torch.equal(buffers[name], buffer), name


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["beit_base_patch16_224", "beitv2_base_patch16_224", "eva02_tiny_patch14_224"])
def test_the_norm_behind_timms_pooling_is_the_towers_norm(tmp_path, architecture):
    outside = spread(timm.create_model(architecture, img_size=16, num_classes=7, **SIZES))
    state, path = outside.state_dict(), tmp_path / "vit.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    tower = tower_of(architecture)
    assert vision_errors(str(path), tower) == []
    load_vision(tower, str(path))
    pixels = torch.randn(2, 3, 16, 16)
    expected = outside.fc_norm(outside.forward_features(pixels))
    torch.testing.assert_close(tower(pixels)[:, -1], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("image_size", [8, 24, 40])
@pytest.mark.parametrize("sharing", [{}, {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}])
def test_relative_position_tables_are_resized_as_timm_does(tmp_path, image_size, sharing):
    sizes = SIZES | sharing
    small, outside = (
        spread(timm.create_model("beit_base_patch16_224", img_size=size, num_classes=0, global_pool="token", **sizes))
        for size in (16, image_size)
    )
    path = tmp_path / "vit.safetensors"
    save_file(small.state_dict(), path)
    outside.load_state_dict(checkpoint_filter_fn(small.state_dict(), outside), strict=False)
    tower = VisionTower(Unimo3VisionConfig("beit_base_patch16_224", image_size, sizes), DEPTH).eval()
    assert vision_errors(str(path), tower) == []
    load_vision(tower, str(path))
    pixels = torch.randn(2, 3, image_size, image_size)
    torch.testing.assert_close(tower(pixels)[:, -1], outside.forward_features(pixels), atol=1e-5, rtol=1e-5)


# Architectures with scales of layers, separate biases of attention, and every kind of norm.
CONSTANTS = (
    *EVA_AND_BEIT,
    "deit3_small_patch16_224",
    "vit_relpos_base_patch16_cls_224",
    "vit_base_patch16_xp_224",
    "vit_small_resnet26d_224",
    "vit_base_r26_s32_224",
)


@pytest.mark.parametrize("architecture", CONSTANTS)
def test_constants_of_timms_layers_begin_as_timms(architecture):
    sizes = {name: size for name, size in SIZES.items() if name != "patch_size" or "_r" not in architecture}
    outside = timm.create_model(architecture, img_size=32, num_classes=0, global_pool="", **sizes)
    constants = {
        name: parameter.flatten()[0].item()
        for name, parameter in outside.named_parameters()
        if (parameter == parameter.flatten()[0]).all()
    }
    tower = VisionTower(Unimo3VisionConfig(architecture, 32, sizes))
    initialize_weights(spread(tower), seed=0)
    parameters = dict(tower.vit.named_parameters())
    for name, constant in constants.items():
        # A residual network's last norm of a block may begin at one as well.
        is_last_norm = name.endswith(("bn3.weight", "norm3.weight"))
        assert (parameters[name] == (1.0 if is_last_norm else constant)).all(), name
    assert parameters["blocks.0.mlp.fc1.weight" if "_xp_" not in architecture else "blocks.0.in_proj.weight"].std() > 0


def test_position_tables_without_a_class_token_are_resized(tmp_path):
    architecture = "vit_small_patch16_rope_ape_224"
    outside = timm.create_model(architecture, img_size=16, num_classes=0, global_pool="token", **SIZES)
    save_file(outside.state_dict(), tmp_path / "vit.safetensors")
    tower = tower_of(architecture, 24)
    load_vision(tower, str(tmp_path / "vit.safetensors"))
    assert tower(torch.randn(1, 3, 24, 24)).shape == (1, DEPTH, 10, 32)
