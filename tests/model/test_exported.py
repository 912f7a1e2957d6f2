"""Exported weights at another resolution: the position table is resized bicubically, all else is the same."""

import pytest
import torch
from torch.nn.functional import interpolate

from tests.tiny import tiny_config, tiny_pretraining_model
from unimo3.errors import CheckpointError
from unimo3.model.downstream import Unimo3ForVisualQuestionAnswering
from unimo3.model.pretrained import load_exported

TABLE = "unimo3.vision_tower.vit.pos_embed"


def vision(image_size, patch_size=8):
    return {
        "image_size": image_size,
        "overrides": {"patch_size": patch_size, "embed_dim": 32, "depth": 2, "num_heads": 2},
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    model = tiny_pretraining_model(vision_config=vision(32))
    model.save_pretrained(folder)
    return folder, dict(model.named_parameters())


def loaded_at(folder, image_size, **changes):
    model = Unimo3ForVisualQuestionAnswering(tiny_config(vision_config=vision(image_size, **changes), num_answers=3))
    load_exported(model, str(folder), fresh=r"^vqa_head\.")
    return model


@pytest.mark.parametrize("image_size", [16, 48])
def test_only_the_position_table_is_resized_bicubically(exported, image_size):
    folder, before = exported
    model = loaded_at(folder, image_size)
    side = image_size // 8
    for name, parameter in model.named_parameters():
        if name == TABLE:
            grid = before[TABLE][:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
            resized = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
            expected = torch.cat([before[TABLE][:, :1], resized.permute(0, 2, 3, 1).reshape(1, side * side, 32)], dim=1)
            torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-5)
        elif not name.startswith("vqa_head."):
            assert torch.equal(parameter, before[name]), name
    out = model(torch.tensor([[0, 7, 2]]), torch.randn(1, 3, image_size, image_size))
    assert out.logits.shape == (1, 3)


def test_at_the_same_resolution_the_table_is_the_same(exported):
    folder, before = exported
    assert torch.equal(loaded_at(folder, 32).get_parameter(TABLE), before[TABLE])


def test_another_patch_size_is_an_error_of_shape(exported):
    with pytest.raises(CheckpointError, match=r"of another shape: .*\.vit\.patch_embed\.proj\.weight"):
        loaded_at(exported[0], 32, patch_size=16)
