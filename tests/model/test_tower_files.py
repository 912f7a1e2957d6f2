"""Files of towers that do not fit, cannot be read or lack a tensor: each is one error that names them."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import (
    BridgeTowerConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.model.tower_cases import ARCHITECTURE, DEPTH, SIZES, clip_vision, image_tower, tower_of
from tests.tiny import tiny_config, tiny_pretraining_model
from unimo3.errors import CheckpointError, ConfigError
from unimo3.model.args import ModelArgs, TextArgs, VisionArgs
from unimo3.model.pretrained import (
    load_text,
    load_vision,
    vision_errors,
)


def test_files_that_do_not_fit_are_named_before_anything_starts(tmp_path):
    other = timm.create_model(ARCHITECTURE, img_size=16, num_classes=0, **(SIZES | {"depth": 2, "embed_dim": 64}))
    save_file(other.state_dict(), tmp_path / "vit.safetensors")
    (tmp_path / "text.txt").write_text("no weights")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    (tmp_path / "code.pth").write_bytes(b"no pickle")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")

    def errors_of(name: str) -> list[str]:
        vision = VisionArgs(init=str(tmp_path / name), image_size=16, patch_size=8, width=32, depth=DEPTH, num_heads=2)
        text = TextArgs(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        return ModelArgs(text, vision, hidden_size=32, num_hidden_layers=1, num_attention_heads=2).validate()

    width, depth = errors_of("vit.safetensors")
    assert "has width 64, model.vision has 32; use weights" in width
    assert "has depth 2, model.vision has 3" in depth
    assert "unknown kind of file; one of .safetensors, .pth" in errors_of("text.txt")[0]
    assert "is no complete safetensors file" in errors_of("broken.safetensors")[0]
    assert "cannot be read as plain tensors" in errors_of("code.pth")[0]
    assert "contains no 'patch_embed.proj.weight'" in errors_of("other.safetensors")[0]
    assert "neither a file nor a folder with config.json" in errors_of("nothing")[0]


def test_a_missing_tensor_of_a_timm_checkpoint_is_named(tmp_path):
    state = timm.create_model(ARCHITECTURE, img_size=16, num_classes=0, **SIZES).state_dict()
    state.pop("blocks.1.mlp.fc1.bias")
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.mlp\.fc1\.bias"):
        load_vision(image_tower(16), str(tmp_path / "vit.safetensors"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bridge": True, "num_hidden_layers": 3}, "model.bridge: true: needs a tower layer for each of the 3 fusion"),
        ({"unimodal_levels": 3}, "model.unimodal_levels: 3: model.text.num_hidden_layers is 2; lower it"),
        ({"unimodal_levels": -1}, "model.unimodal_levels: -1: 0 or a number"),
        ({"unimodal_levels": 1, "interaction": "in_layer"}, "model.unimodal_levels: 1: in_layer reads the partner"),
    ],
)
def test_levels_that_do_not_exist_are_errors(changes, named):
    args = ModelArgs(
        TextArgs(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        VisionArgs(image_size=16, patch_size=8, width=32, depth=2, num_heads=2),
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "bridge": False, **changes},
    )
    assert named in args.validate()[0]


FOLDER_FIELDS = {
    "model.text.init": lambda folder: ModelArgs(text=TextArgs(init=folder)),
    "model.vision.init": lambda folder: ModelArgs(vision=VisionArgs(init=folder)),
    "model.init": lambda folder: ModelArgs(init=folder),
}


@pytest.mark.parametrize("field", FOLDER_FIELDS)
@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("{", "its config.json is none of transformers'"),
        ('{"architecture": "vit_base_patch16_224"}', "its config.json is none of transformers'"),
        ('{"model_type": "no_such_model"}', "its config.json is none of transformers'"),
        ('{"model_type": "bert"}', "contains a 'bert' model"),
        (None, "no config.json there|nor a folder with config.json|neither a file nor a folder"),
    ],
)
def test_a_wrong_folder_is_an_error_of_its_field(tmp_path, field, config, named):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (problem,) = FOLDER_FIELDS[field](str(tmp_path)).validate()
    assert problem.startswith(f"{field}: '{tmp_path}': ")
    assert re.search(named, problem)


@pytest.mark.parametrize("field", FOLDER_FIELDS)
def test_a_truncated_weights_file_is_named(tmp_path, field):
    kinds = {
        "model.text.init": RobertaConfig(),
        "model.vision.init": CLIPVisionConfig(),
        "model.init": BridgeTowerConfig(),
    }
    kinds[field].save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    (problem,) = FOLDER_FIELDS[field](str(tmp_path)).validate()
    assert problem.startswith(f"{field}: '{tmp_path}': model.safetensors is no complete safetensors file")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_attention_heads": 4}, "num_heads 4"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"intermediate_size": 64}, "inner width 64"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06"),
    ],
)
def test_a_clip_of_another_form_is_named(tmp_path, changes, named):
    config = clip_vision()
    config.update(changes)
    CLIPVisionModel(config).save_pretrained(tmp_path)
    (problem,) = vision_errors(str(tmp_path), image_tower(16))
    assert f"has {named}, model.vision has" in problem


@pytest.mark.parametrize(
    ("vision", "named"),
    [
        (
            VisionArgs(architecture="vit_base_mci_224", image_size=100),
            "model.vision.image_size: 100: not a",
        ),
        (
            VisionArgs(architecture="vit_small_patch16_rope_mixed_224", image_size=224),
            "learns the frequencies of its rotary positions, which timm draws without the run's seed",
        ),
        (VisionArgs(width=100), "timm cannot build such a vision transformer"),
        *(
            (VisionArgs(architecture=name, image_size=224), f"'{name}': is a {kind} of timm{reason}; use one of timm's")
            for name, kind, reason in (
                ("swin_tiny_patch4_window7_224", "SwinTransformer", ""),
                ("resnet18", "ResNet", ""),
                ("mvitv2_base_cls", "MultiScaleVit", ""),
                ("crossvit_9_240", "CrossVit", ""),
                ("cait_xxs24_224", "Cait", ": its class token joins after the layers"),
                ("xcit_nano_12_p16_224", "Xcit", ": its class token joins after the layers"),
                ("convit_tiny", "ConVit", ": its class token joins between the layers"),
                ("naflexvit_base_patch16_map", "NaFlexVit", ": it resizes its position table to every image"),
                ("samvit_base_patch16_224", "VisionTransformerSAM", ": its layers return maps, not tokens"),
                (
                    "deit_small_distilled_patch16_224",
                    "VisionTransformerDistilled",
                    ": timm builds it only with heads for its class and distillation tokens",
                ),
            )
        ),
    ],
)
def test_unsupported_towers_are_errors(vision, named):
    assert named in ModelArgs(vision=vision).validate()[0]


def test_a_tensor_given_twice_is_named(tmp_path):
    tower = tiny_pretraining_model().unimo3.text_tower
    state = {name: tensor.contiguous() for name, tensor in tower.state_dict().items()}
    state["roberta.encoder.layer.0.output.dense.bias"] = torch.zeros(32)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"^model\.text\.init: .*there twice: roberta\.encoder\.layer\.0\.output"):
        load_text(tower, str(tmp_path))


def test_weights_in_several_files_are_those_that_their_index_names(tmp_path):
    source, tower = (tiny_pretraining_model(seed=seed).unimo3.text_tower for seed in (1, 2))
    source.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    save_file({"left.over": torch.zeros(1)}, tmp_path / "model-of-another-time.safetensors")
    load_text(tower, str(tmp_path))
    for name, parameter in tower.named_parameters():
        assert torch.equal(parameter, source.get_parameter(name)), name
    first = sorted(tmp_path.glob("model-0*.safetensors"))[0]
    first.unlink()
    with pytest.raises(
        ConfigError, match=rf"model\.text\.init: .*{first.name}, which {index.name} names, is not there"
    ):
        TextArgs(init=str(tmp_path)).to_config()
    for text in ("[]", "no JSON", '{"weight_map": {}}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": null}}'):
        index.write_text(text)
        with pytest.raises(ConfigError, match=rf"{index.name} is no index that names files of weights; copy it again"):
            TextArgs(init=str(tmp_path)).to_config()


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("blocks.1.mlp.fc1.bias", None, "missing: blocks.1.mlp.fc1.bias"),
        ("blocks.0.attn.relative_position_bias_table", (11, 2), r"of another shape: blocks.0.attn.relative_position_"),
        ("blocks.0.attn.relative_position_bias_table", (2, 2), r"of another shape: blocks.0.attn.relative_position_"),
        ("blocks.0.norm3.weight", (32,), "unexpected: blocks.0.norm3.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_anything_starts(tmp_path, name, shape, named):
    state = timm.create_model("beit_base_patch16_224", img_size=16, num_classes=0, **SIZES).state_dict()
    state.pop(name, None)
    save_file(state | ({name: torch.zeros(shape)} if shape else {}), tmp_path / "vit.safetensors")
    vision = VisionArgs(str(tmp_path / "vit.safetensors"), "beit_base_patch16_224", 16, 8, 32, DEPTH, 2)
    text = TextArgs(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    (problem,) = ModelArgs(text, vision, hidden_size=32, num_hidden_layers=2, num_attention_heads=2).validate()
    assert problem.startswith(f"model.vision.init: '{vision.init}': its tensors do not fit Beit; {named}")


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("roberta.encoder.layer.1.output.dense.bias", None, "missing: encoder.layer.1.output.dense.bias"),
        ("roberta.embeddings.position_embeddings.weight", (7, 32), "of another shape: roberta.embeddings.position_"),
        ("roberta.encoder.layer.2.output.dense.bias", (32,), "unexpected: roberta.encoder.layer.2.output.dense.bias"),
    ],
)
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_a_robertas_tensors_are_compared_before_anything_starts(tmp_path, name, shape, named, max_shard_size):
    outside = RobertaForMaskedLM(RobertaConfig(**tiny_config().text_config.to_diff_dict() | {"num_hidden_layers": 2}))
    state = outside.state_dict()
    state.pop(name, None)
    outside.save_pretrained(
        tmp_path, state_dict=state | ({name: torch.zeros(shape)} if shape else {}), max_shard_size=max_shard_size
    )
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    vision = VisionArgs("nowhere", ARCHITECTURE, 16, 8, 32, DEPTH, 2)
    args = ModelArgs(TextArgs(init=str(tmp_path)), vision, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    of_text, of_vision = sorted(args.validate())
    assert of_text.startswith(f"model.text.init: '{tmp_path}': its tensors do not fit RobertaModel; {named}")
    assert of_vision.startswith("model.vision.init: 'nowhere': ")


def test_missing_tensors_of_a_clip_are_named_before_anything_starts(tmp_path):
    CLIPVisionModel(clip_vision()).save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (problem,) = vision_errors(str(tmp_path), image_tower(16))
    assert "its tensors do not fit VisionTransformer; missing: blocks.0" in problem


def test_a_clip_for_an_eva_is_named(tmp_path):
    CLIPVisionModel(clip_vision()).save_pretrained(tmp_path)
    (problem,) = vision_errors(str(tmp_path), tower_of("eva02_tiny_patch14_224"))
    assert "is a CLIP, model.vision a Eva of timm with layers of another form; name a timm checkpoint file" in problem
