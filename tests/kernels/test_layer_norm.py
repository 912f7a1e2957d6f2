"""Which layer norm a model runs, and that apex's equals torch's where there is one to compare."""

import logging

import pytest
import torch

from tests.tiny import tiny_batch, tiny_pretraining_model
from unimo3.apex import NORM_EXTENSION, missing_apex
from unimo3.errors import ConfigError
from unimo3.kernels.args import KernelArgs
from unimo3.kernels.layer_norm import ApexLayerNorm, use_apex_layer_norm
from unimo3.training.engine import prepare_layers

MISSING = missing_apex(NORM_EXTENSION)


def prepared(**settings):
    model = tiny_pretraining_model()
    prepare_layers(model, KernelArgs(**settings), activation_checkpointing=False, compile_towers=False)
    return model


def apex_norms(model) -> int:
    return sum(isinstance(module, ApexLayerNorm) for module in model.modules())


@pytest.mark.skipif(not MISSING, reason="apex is here")
def test_without_apex_auto_uses_torchs_norm_and_logs_it(caplog):
    caplog.set_level(logging.INFO)
    assert apex_norms(prepared()) == 0
    assert "layer norm: torch's (kernels.layer_norm: auto)" in caplog.text


@pytest.mark.skipif(not MISSING, reason="apex is here")
def test_apex_requested_but_missing_is_an_error_with_the_reason():
    with pytest.raises(ConfigError, match=r"kernels.layer_norm: 'apex': NVIDIA's apex .*; use auto or torch"):
        prepared(layer_norm="apex")


def test_all_layer_norms_of_towers_and_fusion_change_and_no_parameter_does():
    model = tiny_pretraining_model()
    names = [name for name, _ in model.named_parameters()]
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    batch = tiny_batch(2)
    inputs = (batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    before = model.unimo3(*inputs).pooler_output
    assert use_apex_layer_norm(model) == len(norms) == apex_norms(model)
    assert [name for name, _ in model.named_parameters()] == names
    # On a CPU the class runs torch's.
    assert torch.equal(model.unimo3(*inputs).pooler_output, before)


def test_a_norm_of_another_dimension_stays():
    from timm.layers import LayerNorm2d

    assert use_apex_layer_norm(torch.nn.Sequential(LayerNorm2d(4), torch.nn.LayerNorm(4, bias=False))) == 0


def test_a_kernel_that_does_not_support_the_model_is_refused():
    # Its heads are 16 wide.
    with pytest.raises(ConfigError, match=r"kernels.cross_layer_attention: 'triton': supports head widths .* is 16"):
        prepared(cross_layer_attention="triton")


@pytest.mark.gpu
@pytest.mark.skipif(MISSING != "", reason="needs NVIDIA's apex and a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apexs_equals_torchs(dtype):
    torch.manual_seed(0)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    x = torch.randn(33, 50, 768, device="cuda", dtype=dtype)
    ours, theirs = (torch.nn.LayerNorm(768, eps=1e-12, device="cuda", dtype=dtype) for _ in range(2))
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(other.copy_(torch.randn_like(other)))
    assert use_apex_layer_norm(ours) == 1
    grad_out = torch.randn_like(x)
    results = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        grads = torch.autograd.grad(out, [leaf, norm.weight, norm.bias], grad_out)
        results.append([out, *grads])
    for actual, wanted in zip(*results, strict=True):
        scale = float(wanted.float().abs().max())
        torch.testing.assert_close(actual.float(), wanted.float(), atol=tolerance * scale, rtol=tolerance)
