"""What cross-layer interaction must be: METER's layer, gates that reduce to it, gradients everywhere."""

import pytest
import torch
from transformers.models.bridgetower.configuration_bridgetower import BridgeTowerTextConfig
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer

from tests.tiny import tiny_batch, tiny_config, tiny_pretraining_model
from unimo3.model import attention
from unimo3.model.attention import CrossLayerAttention
from unimo3.model.fusion import FusionEncoder, StreamLayer, mean_gates
from unimo3.model.initialization import initialize_weights
from unimo3.model.level_gate import LevelGate


def draw_streams(batch=2, tokens=6, patches=5, width=32):
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(batch, tokens, width, generator=generator)
    image = torch.randn(batch, patches, width, generator=generator)
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[0, 4:] = False
    return text, image, mask


def run(fusion, text, image, mask):
    """The same states as both the mapped inputs and the towers' states, for every layer."""
    num_states = len(fusion.text.layers)
    texts, images = (x[:, None].expand(-1, num_states, -1, -1) for x in (text, image))
    return fusion(texts, images, texts, images, mask)


def encoder(**changes):
    fusion = FusionEncoder(tiny_config(**changes), 32, 32).eval()
    initialize_weights(fusion, 0, std=0.2)
    return fusion


def test_in_layer_equals_meters_cross_layer():
    layer = encoder(interaction="in_layer").text.layers[0]
    config = BridgeTowerTextConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=128, layer_norm_eps=1e-12, attn_implementation="eager"
    )
    outside = BridgeTowerBertCrossLayer(config).eval()
    fill_bridgetower_layer(outside, layer)
    text, image, mask = draw_streams()
    additive = torch.zeros(2, 1, 1, 6).masked_fill(~mask[:, None, None, :], torch.finfo(torch.float32).min)
    expected = outside(text, image, attention_mask=additive)[0]
    actual, _, _ = layer(text, image, [], mask, None)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


def fill_bridgetower_layer(outside, layer: StreamLayer):
    """Copy our weights into transformers' layer."""
    ours = layer.self_attention
    for name, part in zip(
        ("query", "key", "value"), zip(ours.qkv.weight.chunk(3), ours.qkv.bias.chunk(3), strict=True), strict=True
    ):
        copy(getattr(outside.attention.self, name), *part)
    copy(outside.attention.output.dense, ours.out.weight, ours.out.bias)
    copy(outside.attention.output.LayerNorm, ours.norm.weight, ours.norm.bias)
    cross, projection = layer.cross_attention, layer.partner_key_value.projection
    copy(outside.crossattention.self.query, cross.query.weight, cross.query.bias)
    key, value = zip(projection.weight.chunk(2), projection.bias.chunk(2), strict=True)
    copy(outside.crossattention.self.key, *key)
    copy(outside.crossattention.self.value, *value)
    copy(outside.crossattention.output.dense, cross.out.weight, cross.out.bias)
    copy(outside.crossattention.output.LayerNorm, cross.norm.weight, cross.norm.bias)
    copy(outside.intermediate.dense, layer.feed_forward.inner.weight, layer.feed_forward.inner.bias)
    copy(outside.output.dense, layer.feed_forward.outer.weight, layer.feed_forward.outer.bias)
    copy(outside.output.LayerNorm, layer.feed_forward.norm.weight, layer.feed_forward.norm.bias)


def copy(module, weight, bias):
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)


def test_gates_one_hot_on_the_in_layer_level_give_in_layer_exactly(monkeypatch):
    crossing, in_layer = encoder(interaction="cross_layer"), encoder(interaction="in_layer")
    shared = in_layer.state_dict()
    crossing.load_state_dict(shared, strict=False)

    def one_hot(self, h):
        gates = torch.zeros(*h.shape[:2], self.num_heads, self.num_levels)
        gates[..., -1] = 1
        return gates

    monkeypatch.setattr(LevelGate, "forward", one_hot)
    streams = draw_streams()
    expected, actual = run(in_layer, *streams), run(crossing, *streams)
    torch.testing.assert_close(actual.text, expected.text, atol=0, rtol=0)
    torch.testing.assert_close(actual.image, expected.image, atol=0, rtol=0)


def test_uniform_gates_are_the_mean_of_the_levels():
    uniform, static = encoder(gate="uniform"), encoder(gate="static", gate_init=0.5)
    static.load_state_dict(uniform.state_dict(), strict=False)
    for layer in (*static.text.layers, *static.image.layers):
        if layer.cross_attention.gate is not None:
            torch.nn.init.zeros_(layer.cross_attention.gate.bias)
    streams = draw_streams()
    expected, actual = run(static, *streams), run(uniform, *streams)
    torch.testing.assert_close(actual.text, expected.text, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.image, expected.image, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", ["token", "static"])
@pytest.mark.parametrize("gate_init", [0.3, 0.9])
def test_the_in_layer_level_starts_at_its_configured_weight(gate, gate_init):
    fusion = encoder(gate=gate, gate_init=gate_init)
    for layer in fusion.text.layers[1:]:
        attention = layer.cross_attention
        gates = attention.gate(torch.randn(2, 3, 32))
        torch.testing.assert_close(gates[..., -1], torch.full((2, 3, 2), gate_init))
        torch.testing.assert_close(gates.sum(-1), torch.ones(2, 3, 2))


def test_level_projections_run_once_per_level():
    fusion = encoder()
    calls = []
    for layer in (*fusion.text.layers, *fusion.image.layers):
        layer.partner_key_value.register_forward_hook(lambda *_: calls.append(1))
    run(fusion, *draw_streams())
    assert len(calls) == 2 * len(fusion.text.layers)


@pytest.fixture
def levels_read(monkeypatch):
    """The number of levels and of gates in each call of the operation, in the order of the calls."""
    seen = []
    original = attention.cross_layer_attention

    def spy(q, levels, gate, *rest):
        seen.append((len(levels), 1 if gate is None else gate.shape[-1]))
        return original(q, levels, gate, *rest)

    monkeypatch.setattr(attention, "cross_layer_attention", spy)
    return seen


def test_layer_l_sees_levels_up_to_its_partner(levels_read):
    run(encoder(), *draw_streams())
    assert levels_read == [(1, 1), (1, 1), (2, 2), (2, 2), (3, 3), (3, 3)]
    levels_read.clear()
    run(encoder(interaction="in_layer"), *draw_streams())
    assert levels_read == [(1, 1)] * 6


@pytest.mark.parametrize("gate", ["token", "static"])
def test_every_gate_receives_gradient(gate):
    fusion = encoder(gate=gate)
    out = run(fusion, *draw_streams())
    (out.text.pow(3).sum() + out.image.pow(3).sum()).backward()
    gates = [m for m in fusion.modules() if isinstance(m, LevelGate)]
    assert len(gates) == 4
    for module in gates:
        for parameter in module.parameters():
            assert parameter.grad.abs().max() > 1e-6


def test_padding_does_not_reach_real_tokens():
    fusion = encoder()
    text, image, mask = draw_streams()
    before = run(fusion, text, image, mask)
    text[0, 4:] = 100.0
    after = run(fusion, text, image, mask)
    torch.testing.assert_close(after.image, before.image)
    torch.testing.assert_close(after.text[mask], before.text[mask])


def test_gates_are_returned_on_request():
    model = tiny_pretraining_model().unimo3
    batch = tiny_batch(2)
    out = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], output_gates=True)
    assert [None if g is None else tuple(g.shape) for g in out.text_gates] == [None, (2, 10, 2, 2), (2, 10, 2, 3)]
    assert out.image_gates[2].shape == (2, 5, 2, 3)
    assert isinstance(model.fusion.text.layers[1].cross_attention, CrossLayerAttention)


def test_mean_gates_are_of_real_tokens_and_zero_for_unseen_levels():
    gates = [None, torch.rand(2, 3, 2, 2).softmax(-1), torch.rand(2, 3, 2, 3).softmax(-1)]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    means = mean_gates(gates, mask)
    assert means.shape == (2, 2, 3)
    assert torch.equal(means[0, :, 2], torch.zeros(2))
    for layer, gate in enumerate(gates[1:]):
        expected = (gate[0, 0] + gate[0, 1] + gate[1, 0]) / 3
        torch.testing.assert_close(means[layer, :, : gate.shape[-1]], expected)
    assert mean_gates([None, None], mask) is None


def test_a_new_model_gives_the_in_layer_level_its_initial_weight():
    model = tiny_pretraining_model(gate_init=0.7)
    batch = tiny_batch(2)
    fused = model.unimo3(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], output_gates=True)
    for gates in (fused.text_gates, fused.image_gates):
        means = mean_gates(gates, None)
        torch.testing.assert_close(means[0, :, 1], torch.full((2,), 0.7))
        torch.testing.assert_close(means[1], torch.tensor([[0.15, 0.15, 0.7]] * 2))


def test_unimodal_levels_are_the_towers_top_layers_below_level_0(levels_read):
    fusion = encoder(unimodal_levels=2)
    run(fusion, *draw_streams())
    assert levels_read == [(3, 3), (3, 3), (4, 4), (4, 4), (5, 5), (5, 5)]


def test_unimodal_levels_read_the_last_tower_layers_lowest_first():
    fusion = encoder(unimodal_levels=2)
    states = torch.randn(2, 4, 5, 32)
    low, high = fusion.image.tower_levels(states)
    for level, project, state in zip((low, high), fusion.image.tower_key_values, (2, 3), strict=True):
        expected = project(states[:, state])
        assert torch.equal(level, expected)


def test_a_bridge_joins_each_layers_input_with_its_tower_layer():
    bridged = encoder(bridge=True)
    text, image, mask = draw_streams()
    texts, images = torch.randn(2, 3, *text.shape[1:]), torch.randn(2, 3, *image.shape[1:])
    inputs = []
    for layer in bridged.text.layers:
        layer.register_forward_hook(lambda _, args, out: inputs.append((args[0], out[0])))
    bridged(texts, images, texts, images, mask)
    norms = bridged.text.bridge_norms
    torch.testing.assert_close(inputs[0][0], norms[0](texts[:, 0]))
    for depth in (1, 2):
        torch.testing.assert_close(inputs[depth][0], norms[depth](texts[:, depth] + inputs[depth - 1][1]))


@pytest.mark.parametrize("changes", [{"bridge": True}, {"unimodal_levels": 2}, {"bridge": True, "unimodal_levels": 1}])
def test_every_parameter_of_every_mode_receives_gradient(changes):
    model = tiny_pretraining_model(**changes, num_hidden_layers=2).unimo3
    batch = tiny_batch(3)
    out = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    (out.text_features.pow(3).sum() + out.image_features.pow(3).sum() + out.pooler_output.pow(3).sum()).backward()
    unreached = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unreached == []


@pytest.mark.parametrize("changes", [{}, {"interaction": "in_layer"}, {"bridge": True, "unimodal_levels": 2}])
def test_activation_checkpointing_changes_neither_outputs_nor_gradients(changes):
    (plain, plain_gradients, plain_calls), (checkpointed, gradients, calls) = (
        pooled_and_gradients(changes, enable) for enable in (False, True)
    )
    assert plain_calls == ["fusion", "image", "text"]
    assert calls == ["fusion", "fusion", "image", "image", "text", "text"]
    torch.testing.assert_close(checkpointed, plain, atol=0, rtol=0)
    torch.testing.assert_close(gradients, plain_gradients, atol=0, rtol=0)


def test_reentrant_checkpointing_is_refused():
    model = tiny_pretraining_model()
    with pytest.raises(ValueError, match="use_reentrant=True: not supported"):
        model.activation_checkpointing_enable({"use_reentrant": True})


def pooled_and_gradients(changes, checkpointing):
    """Pooled output, gradients, and which layers ran how often."""
    batch, calls = tiny_batch(3), []
    model = tiny_pretraining_model(**changes, num_hidden_layers=2).unimo3.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    model.fusion.text.layers[0].self_attention.register_forward_hook(lambda *_: calls.append("fusion"))
    model.text_tower.encoder.layer[0].attention.register_forward_hook(lambda *_: calls.append("text"))
    model.vision_tower.vit.blocks[0].attn.register_forward_hook(lambda *_: calls.append("image"))
    pooled = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"]).pooler_output
    pooled.pow(2).sum().backward()
    return pooled, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sorted(calls)


def test_eager_attention_equals_sdpa(monkeypatch):
    batch = tiny_batch(3)
    outputs, calls = [], []
    eager = attention.eager_attention
    monkeypatch.setattr(
        attention, "eager_attention", lambda *args, **kwargs: (calls.append(1), eager(*args, **kwargs))[1]
    )
    for implementation in ("sdpa", "eager"):
        assert calls == []
        model = tiny_pretraining_model().unimo3
        model.set_attn_implementation(implementation)
        assert model.text_tower.config._attn_implementation == implementation
        outputs.append(model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"]).pooler_output)
    assert len(calls) == 6  # two streams of three layers
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
