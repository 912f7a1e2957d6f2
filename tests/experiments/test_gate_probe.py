"""Gates of a trained model: forced to one level, and their means over groups of samples."""

import pytest
import torch

from experiments.gate_probe import GateRecorder, forced, forcings
from experiments.variants import toy_model
from unimo3.model.initialization import initialize_weights
from unimo3.model.unimo3 import Unimo3Model


def model_of(**others):
    config = toy_model(16, 3, 32, 50, **others).to_config()
    model = Unimo3Model(config).eval()
    initialize_weights(model, 0, 0.3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.normal_(generator=generator)
    return model


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return torch.randint(5, 50, (2, 5), generator=generator), torch.rand(2, 3, 32, 32, generator=generator), mask


@torch.no_grad()
def outputs(model, inputs):
    out = model(*inputs, output_gates=True)
    return out.text_gates, out.image_gates, out


def test_forced_to_the_partner_a_model_is_in_layer(inputs):
    crossing, in_layer = model_of(interaction="cross_layer", gate="token"), model_of(interaction="in_layer")
    in_layer.load_state_dict({k: v for k, v in crossing.state_dict().items() if ".gate." not in k})
    expected = outputs(in_layer, inputs)[2]
    with forced(crossing.fusion, "partner"):
        actual = outputs(crossing, inputs)[2]
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output)
    free = outputs(crossing, inputs)[2]
    assert not torch.allclose(free.pooler_output, expected.pooler_output, atol=1e-3)


def test_forced_to_a_level_all_gates_are_on_it_or_the_partner(inputs):
    model = model_of(interaction="cross_layer", gate="token", unimodal_levels=0)
    assert forcings(model.fusion) == ["partner", "level 0", "level 1"]
    with forced(model.fusion, "level 1"):
        for gates in outputs(model, inputs)[:2]:
            chosen = [None if gate is None else gate.argmax(-1).unique().tolist() for gate in gates]
            assert chosen == [None, [1], [1]]
            assert all(gate is None or gate.max() == gate.sum(-1).max() == 1 for gate in gates)
    assert forcings(model_of(interaction="in_layer").fusion) == []


def test_means_are_of_a_groups_real_tokens(inputs):
    model = model_of(interaction="cross_layer", gate="token")
    recorder = GateRecorder(model.fusion)
    with recorder.recording():
        text, image, _ = outputs(model, inputs)
        recorder.add(["fine", "scene"], inputs[2])
        outputs(model, inputs)
        recorder.add(["fine", None], inputs[2])  # it repeats another, as the last batch of an evaluation does
    means = recorder.means()
    assert list(means) == ["overall", "fine", "scene"]
    assert means["fine"]["text"][0] == [1.0]
    assert means["fine"]["text"][2] == pytest.approx(text[2][0].mean(dim=(0, 1)).tolist(), abs=1e-6)
    assert means["scene"]["text"][2] == pytest.approx(text[2][1, :3].mean(dim=(0, 1)).tolist(), abs=1e-6)
    assert means["scene"]["image"][1] == pytest.approx(image[1][1].mean(dim=(0, 1)).tolist(), abs=1e-6)
    each = torch.tensor([means["fine"]["text"][2], means["fine"]["text"][2], means["scene"]["text"][2]])
    assert means["overall"]["text"][2] == pytest.approx(each.mean(0).tolist(), abs=1e-6)
    assert GateRecorder(model_of(interaction="in_layer").fusion).means() == {}


def test_the_partners_spread_is_over_a_samples_real_tokens_and_heads(inputs):
    model = model_of(interaction="cross_layer", gate="token")
    recorder = GateRecorder(model.fusion)
    with recorder.recording():
        text, image, _ = outputs(model, inputs)
        recorder.add(["fine", "scene"], inputs[2])
        outputs(model, inputs)
        recorder.add([None, None], inputs[2])
    spreads = recorder.spreads()
    assert spreads["text"][0] == spreads["image"][0] == 0.0
    real = torch.cat([text[2][0, :5, :, -1], text[2][1, :3, :, -1]])
    assert spreads["text"][2] == pytest.approx(real.std(correction=0).item(), rel=1e-5)
    assert spreads["image"][1] == pytest.approx(image[1][..., -1].std(correction=0).item(), rel=1e-5)
    assert GateRecorder(model_of(interaction="in_layer").fusion).spreads() == {}
