"""The gates that the pilot of the gate tries: what they compute, and at what rate they learn."""

import pytest
import torch

from experiments.gate_trials import multiply_gate_rate, use_joint_gates
from experiments.variants import toy_model
from unimo3.model.initialization import initialize_weights
from unimo3.model.level_gate import LevelGate
from unimo3.model.unimo3 import Unimo3ForPreTraining
from unimo3.training.args import OptimArgs
from unimo3.training.lr_schedule import set_lr
from unimo3.training.optim import build_optimizer


@pytest.fixture
def model():
    config = toy_model(16, 3, 32, 50, interaction="cross_layer", gate="static", gate_init=0.5).to_config()
    model = Unimo3ForPreTraining(config).eval()
    use_joint_gates(model.unimo3.fusion, config)
    initialize_weights(model, 0, 0.3)
    return model


@torch.no_grad()
def test_joint_gates_give_one_softmax_over_the_keys_of_all_levels(model):
    generator = torch.Generator().manual_seed(0)
    attention = model.unimo3.fusion.text.layers[2].cross_attention
    attention.gate.bias.normal_(generator=generator)
    h = torch.randn(2, 5, 16, generator=generator)
    levels = [torch.randn(2, 7, 2, 4, 4, generator=generator) for _ in range(3)]
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    actual, gate = attention(h, levels, mask)
    query = attention.query(h).unflatten(-1, (4, 4)).transpose(1, 2)
    keys, values = (torch.cat([level[:, :, part] for level in levels], 1).transpose(1, 2) for part in (0, 1))
    bias = attention.gate.bias.view(4, 3).repeat_interleave(7, 1)[None, :, None, :]
    bias = bias.masked_fill(~mask.repeat(1, 3)[:, None, None, :], -torch.inf)
    weights = (query @ keys.transpose(-1, -2) / 2 + bias).softmax(-1)
    read = (weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(actual, attention.norm(h + attention.out(read)))
    torch.testing.assert_close(gate, weights.unflatten(-1, (3, 7)).sum(-1).transpose(1, 2))


def test_all_layers_with_a_gate_have_a_joint_one_and_gradients(model):
    output = model.unimo3(torch.arange(5, 13).view(2, 4), torch.rand(2, 3, 32, 32), torch.ones(2, 4))
    output.pooler_output.square().sum().backward()
    gates = {name: module for name, module in model.named_modules() if isinstance(module, LevelGate)}
    assert len(gates) == 4
    for name, gate in gates.items():
        assert type(gate).__name__ == "JointGate"
        assert gate.bias.grad.abs().max() > 0, name


def test_gates_learn_at_a_multiple_of_the_others_rate(model):
    optimizer = build_optimizer(model, OptimArgs(lr=0.5, fusion_factor=1.0, head_factor=1.0))
    before = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    multiply_gate_rate(optimizer, model, 10.0)
    after = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    assert len(after) == len(before) == sum(len(group["params"]) for group in optimizer.param_groups)
    set_lr(optimizer, 0.1)
    for name, parameter in model.named_parameters():
        assert after[parameter]["lr"] == pytest.approx(0.5 if ".gate." in name else 0.05), name
