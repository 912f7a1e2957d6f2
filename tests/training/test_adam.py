"""Whose AdamW runs, that all of them compute the same, and that each resumes from another's state."""

import logging
import os

import psutil
import pytest
import torch

from tests.spawn import SERVER, run_alone
from tests.waiting import wait_for
from unimo3.apex import OPTIMIZER_EXTENSION, missing_apex
from unimo3.errors import ConfigError
from unimo3.training.adam import build_adam, count_steps_by_parameter

BETAS, EPS = (0.9, 0.98), 1e-8
SIZES = ((7, 5), (64,), (1,), (129, 3))
NO_APEX = missing_apex(OPTIMIZER_EXTENSION)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def weights(device=DEVICE):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(device).requires_grad_() for size in SIZES]


def optimizer_of(parameters, fused, offloaded=False):
    # One parameter a group, as ZeRO has them: DeepSpeed's FusedAdam stores the count with a group's last one alone.
    settings = [{"lr": 1e-2, "weight_decay": 0.1}] * 2 + [{"lr": 3e-3, "weight_decay": 0.0}] * 2
    groups = [{"params": [one], **options} for one, options in zip(parameters, settings, strict=True)]
    return build_adam(groups, BETAS, EPS, fused, offloaded)


def take_steps(optimizer, parameters, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        optimizer.step()


def textbook(parameters, num_steps):
    """Decoupled weight decay as its paper has it, in float64."""
    values = [parameter.detach().double().cpu() for parameter in parameters]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in values]
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(100 + step)
        for index, value in enumerate(values):
            grad = torch.randn(value.shape, generator=generator).double()
            first, second = moments[index]
            first.mul_(BETAS[0]).add_(grad, alpha=1 - BETAS[0])
            second.mul_(BETAS[1]).add_(grad.square(), alpha=1 - BETAS[1])
            lr, decay = (1e-2, 0.1) if index < 2 else (3e-3, 0.0)
            value.mul_(1 - lr * decay)
            ahead = (first / (1 - BETAS[0] ** (step + 1))) / ((second / (1 - BETAS[1] ** (step + 1))).sqrt() + EPS)
            value.sub_(ahead, alpha=lr)
    return values


def assert_equal(parameters, wanted):
    for parameter, exact in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.detach().cpu().double(), exact, atol=2e-6, rtol=2e-6)


# DeepSpeed's is compiled at its first use.
IMPLEMENTATIONS = [
    "torch",
    pytest.param("deepspeed", marks=pytest.mark.integration),
    pytest.param("apex", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_APEX != "", reason=NO_APEX or "-")]),
]


@pytest.mark.parametrize("fused", IMPLEMENTATIONS)
def test_each_implementation_computes_adamw(fused):
    parameters = weights()
    take_steps(optimizer_of(parameters, fused), parameters, 0, 6)
    assert_equal(parameters, textbook(weights(), 6))


@pytest.mark.integration
def test_each_implementation_continues_from_the_others_state():
    others = ["deepspeed"] if NO_APEX else ["deepspeed", "apex"]
    for before, after in [("torch", other) for other in others] + [(other, "torch") for other in others]:
        parameters = weights()
        first = optimizer_of(parameters, before)
        take_steps(first, parameters, 0, 3)
        resumed = [parameter.detach().clone().requires_grad_() for parameter in parameters]
        second = optimizer_of(resumed, after)
        second.load_state_dict(first.state_dict())
        take_steps(second, resumed, 3, 6)
        assert_equal(resumed, textbook(weights(), 6))


@pytest.mark.integration
def test_an_offloaded_optimizer_is_deepspeeds_and_the_log_names_it(caplog):
    caplog.set_level(logging.INFO)
    parameters = weights("cpu")
    optimizer = optimizer_of(parameters, "auto", offloaded=True)
    assert type(optimizer).__name__ == "DeepSpeedCPUAdam"
    assert "DeepSpeedCPUAdam (optim.fused: auto)" in caplog.text


def test_apex_requested_but_unusable_is_an_error_with_the_reason():
    if NO_APEX:
        with pytest.raises(ConfigError, match=r"optim.fused: 'apex': NVIDIA's apex .*; use auto"):
            optimizer_of(weights(), "apex")
    with pytest.raises(ConfigError, match="runs on GPUs alone"):
        optimizer_of(weights(), "apex", offloaded=True)


def build_one(fused):
    """An offloaded AdamW's module, or the text of its error, and the logged messages."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    parameters = [{"params": [torch.zeros(3, requires_grad=True)]}]
    try:
        built = type(build_adam(parameters, BETAS, EPS, fused, offloaded=True)).__module__
    except ConfigError as error:
        built = str(error)
    return built, messages


def build_each(environment):
    os.environ.update(environment)
    return [build_one(fused) for fused in ("deepspeed", "auto")]


@pytest.mark.integration
def test_without_deepspeeds_optimizer_auto_uses_torchs(tmp_path):
    environment = {"CXX": str(tmp_path / "none"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    (error, _), (auto, logged) = run_alone(build_each, environment)
    assert auto.startswith("torch.optim.adamw")
    assert any("torch's AdamW is used" in message for message in logged)
    assert "optim.fused: 'deepspeed': DeepSpeedCPUAdam could not be built" in error
    assert f"CXX is '{tmp_path / 'none'}'" in error


@pytest.mark.integration
def test_a_killed_compilation_blocks_no_later_process(tmp_path):
    killed = SERVER.Process(target=build_each, args=({"TORCH_EXTENSIONS_DIR": str(tmp_path)},))
    killed.start()
    lock = tmp_path / "cpu_adam" / "lock"
    wait_for(lock.exists, "the lock of the compile")
    # The process first: it would take note of a compiler that fails.
    compiler = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    killed.join()
    for each in compiler:
        each.kill()
    psutil.wait_procs(compiler)
    assert lock.exists()
    # It is not waited for: the next build fails at once, for want of a compiler.
    error, _ = run_alone(build_each, {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/nowhere/c++"})[0]
    assert "could not be built" in error


class CountsByGroup(torch.optim.Optimizer):
    """Counts steps and keeps moments as apex's FusedAdam does; instead of an update it notes the count."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.1})
        self.noted = []

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                assert "exp_avg" in state
                self.noted.append(group["step"])


def test_steps_are_counted_by_parameter_under_zero_3():
    parts = [torch.zeros(3, requires_grad=True) for _ in range(3)]
    optimizer = CountsByGroup([{"params": parts[:2]}, {"params": parts[2:]}])
    count_steps_by_parameter(optimizer)
    for _ in range(2):
        for index, part in enumerate(parts):
            for group in optimizer.param_groups:
                group["params"] = []
            optimizer.param_groups[index == 2]["params"] = [part]
            optimizer.step()
    assert optimizer.noted == [1, 1, 1, 2, 2, 2]
    assert [optimizer.state[part]["step"] for part in parts] == [2, 2, 2]
