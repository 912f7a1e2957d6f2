"""AdamW in the implementation that suits the machine: NVIDIA apex's, DeepSpeed's, or torch's fused one.

All keep the same state, ``step``, ``exp_avg`` and ``exp_avg_sq`` a parameter, and each reads what another has saved, so
a run may continue where a package is missing.

Source: apex.optimizers.FusedAdam; deepspeed.ops.adam's FusedAdam and DeepSpeedCPUAdam; torch.optim.AdamW.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch.optim import Optimizer

from unimo3.apex import OPTIMIZER_EXTENSION, missing_apex
from unimo3.errors import ConfigError
from unimo3.training.args import Fused

log = logging.getLogger(__name__)

# Keys of a parameter group; all others are specific to an implementation.
_SHARED = ("params", "lr", "betas", "eps", "weight_decay")


def build_adam(
    groups: list[dict], betas: tuple[float, float], eps: float, fused: Fused, offloaded: bool = False
) -> Optimizer:
    """AdamW over parameter groups that have their own rate and decay; the log names the implementation.

    Args:
        groups: as torch's optimizers take them.
        fused: the implementation. ``auto`` takes DeepSpeed's CPUAdam where `offloaded`, else apex's on a GPU, and
            torch's where that one is not available.
        offloaded: the optimizer's state lies in main memory while the model is on a GPU.

    Raises:
        ConfigError: the requested one is not available here.
    """
    wanted = fused
    if fused == "auto":
        wanted = "deepspeed" if offloaded else "torch" if missing_apex(OPTIMIZER_EXTENSION) else "apex"
    options: dict[str, Any] = {"betas": betas, "eps": eps}
    optimizer: Optimizer
    if wanted == "apex":
        optimizer = _apex(groups, options, offloaded)
    elif wanted == "deepspeed":
        try:
            optimizer = _deepspeed(groups, options, offloaded)
        except _NotBuiltError as error:
            if fused != "auto":
                raise ConfigError(f"optim.fused: 'deepspeed': {error}; fix that, or use torch") from error
            log.warning("%s; torch's AdamW is used, and its update of the offloaded states may be slower", error)
            optimizer = _torch(groups, options)
    else:
        optimizer = _torch(groups, options)
    _read_others(optimizer)
    log.info("optimizer: %s.%s (optim.fused: %s)", type(optimizer).__module__, type(optimizer).__name__, fused)
    return optimizer


class _NotBuiltError(Exception):
    """DeepSpeed's kernel is not available here; the message is the reason."""


def _torch(groups: list[dict], options: dict[str, Any]) -> Optimizer:
    return torch.optim.AdamW(groups, fused=True, **options)


def _apex(groups: list[dict], options: dict[str, Any], offloaded: bool) -> Optimizer:
    reason = missing_apex(OPTIMIZER_EXTENSION)
    if offloaded:
        reason = "its FusedAdam runs on GPUs alone, and the ds_config offloads the optimizer to main memory"
    if reason:
        raise ConfigError(f"optim.fused: 'apex': {reason}; use auto or torch")
    from apex.optimizers import FusedAdam

    optimizer: Optimizer = FusedAdam(groups, adam_w_mode=True, set_grad_none=True, **options)
    count_steps_by_parameter(optimizer)
    return optimizer


def _deepspeed(groups: list[dict], options: dict[str, Any], offloaded: bool) -> Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    on_cpu = offloaded or not torch.cuda.is_available()
    kind, name = (DeepSpeedCPUAdam, "cpu_adam") if on_cpu else (FusedAdam, "fused_adam")
    mode = {"adamw_mode": True} if on_cpu else {"adam_w_mode": True}
    try:
        with _one_builder(name):
            optimizer: Optimizer = kind(groups, **mode, **options)
    except Exception as error:  # of any type: a missing compiler, header or CUDA toolkit
        needed = "a C++ compiler and ninja" if on_cpu else "nvcc of the CUDA version torch was built with"
        compiler = f", CXX is {os.environ['CXX']!r}" if "CXX" in os.environ else ""
        raise _NotBuiltError(
            f"{kind.__name__} could not be built ({_root_of(error)}{compiler}); it needs {needed}"
        ) from error
    return optimizer


@contextmanager
def _one_builder(name: str) -> Iterator[None]:
    """Let one process at a time compile an extension of DeepSpeed's, and remove the file that a killed one left.

    torch marks a build under way by a file, for which every other process waits without end; a process that was killed
    leaves it. Under a lock that a kill frees, such a file can only be a leftover.
    """
    # Loads setuptools, which only a build needs.
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(name, verbose=False))
    with FileLock(f"{folder}.unimo3.lock", fallback_to_soft=False):
        (folder / "lock").unlink(missing_ok=True)
        if not (folder / f"{name}.so").exists():
            log.info("compiling DeepSpeed's %s into %s, once; this can take two minutes", name, folder)
        yield


def count_steps_by_parameter(optimizer: Optimizer) -> None:
    """Store an optimizer's steps with each parameter, although it counts them by group, as apex's FusedAdam does.

    ZeRO-3 cuts a group into parts and calls ``step`` once for each; a group's counter would count every call.
    """

    def before(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            counts = [0]
            for parameter in group["params"]:
                counts.append(optimizer.state[parameter].pop("step", 0))
                if not optimizer.state[parameter]:
                    del optimizer.state[parameter]
            group["step"] = max(counts)

    def after(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in optimizer.state:
                    optimizer.state[parameter]["step"] = group["step"]

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _read_others(optimizer: Optimizer) -> None:
    """Let an optimizer load the state that another implementation has saved."""
    counts_in_tensors = isinstance(optimizer, torch.optim.AdamW)

    def convert_step(step: Any, parameter: torch.Tensor) -> Any:
        if counts_in_tensors:
            # The fused update reads it on the parameter's device.
            return torch.as_tensor(float(step), dtype=torch.float32, device=parameter.device)
        return int(step)

    def fix(optimizer: Optimizer) -> None:
        defaults = {name: value for name, value in optimizer.defaults.items() if name not in _SHARED}
        for group in optimizer.param_groups:
            group.update(defaults)
        for parameter, state in optimizer.state.items():
            if "step" in state:
                state["step"] = convert_step(state["step"], parameter)

    optimizer.register_load_state_dict_post_hook(fix)


def _root_of(error: BaseException) -> str:
    """The message of an error's root cause, which libraries wrap."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
