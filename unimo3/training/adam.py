"""AdamW in the implementation that suits the machine: NVIDIA apex's, DeepSpeed's, or torch's fused one.

All keep the same state, ``step``, ``exp_avg`` and ``exp_avg_sq`` a parameter, and each reads what another has saved, so
a run may go on where a package is missing.

Source: apex.optimizers.FusedAdam; deepspeed.ops.adam's FusedAdam and DeepSpeedCPUAdam; torch.optim.AdamW.
"""

import logging
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from unimo3.apex import OPTIMIZER_EXTENSION, missing_apex
from unimo3.errors import ConfigError

log = logging.getLogger(__name__)

Fused = Literal["auto", "apex", "deepspeed", "torch"]
# Of a parameter group; what else stands there is an implementation's own.
_SHARED = ("params", "lr", "betas", "eps", "weight_decay")


def build_adam(
    groups: list[dict], betas: tuple[float, float], eps: float, fused: Fused, offloaded: bool = False
) -> Optimizer:
    """AdamW over parameter groups that have their own rate and decay; the log says whose it is.

    Args:
        groups: as torch's optimizers take them.
        fused: whose. ``auto`` takes DeepSpeed's CPUAdam where `offloaded`, else apex's on a GPU, and torch's where the
            wished one is not to be had.
        offloaded: the optimizer's state lies in main memory while the model is on a GPU.

    Raises:
        ConfigError: the one asked for cannot be had here.
    """
    wanted = fused
    if fused == "auto":
        no_apex = missing_apex(OPTIMIZER_EXTENSION)
        wanted = "deepspeed" if offloaded else "torch" if no_apex else "apex"
    options: dict[str, Any] = {"betas": betas, "eps": eps}
    optimizer: Optimizer
    try:
        if wanted == "apex":
            optimizer = _apex(groups, options, offloaded)
        elif wanted == "deepspeed":
            optimizer = _deepspeed(groups, options, offloaded)
        else:
            optimizer = torch.optim.AdamW(groups, fused=True, **options)
    except ConfigError as error:
        if fused != "auto":
            raise
        log.warning("%s; the optimizer is torch's, which is slower for offloaded states", error)
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    _read_others(optimizer)
    log.info("optimizer: %s.%s (optim.fused: %s)", type(optimizer).__module__, type(optimizer).__name__, fused)
    return optimizer


def _apex(groups: list[dict], options: dict[str, Any], offloaded: bool) -> Optimizer:
    reason = missing_apex(OPTIMIZER_EXTENSION)
    if offloaded:
        reason = "its FusedAdam runs on GPUs alone, and the ds_config offloads the optimizer to main memory"
    if reason:
        raise ConfigError(f"optim.fused: 'apex': {reason}; use auto")
    from apex.optimizers import FusedAdam

    optimizer: Optimizer = FusedAdam(groups, adam_w_mode=True, set_grad_none=True, **options)
    count_steps_by_parameter(optimizer)
    return optimizer


def _deepspeed(groups: list[dict], options: dict[str, Any], offloaded: bool) -> Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    on_cpu = offloaded or not torch.cuda.is_available()
    kind = DeepSpeedCPUAdam if on_cpu else FusedAdam
    log.info("DeepSpeed's %s is compiled when it is first used here; this can take two minutes", kind.__name__)
    mode = {"adamw_mode": True} if on_cpu else {"adam_w_mode": True}
    try:
        optimizer: Optimizer = kind(groups, **mode, **options)
    except Exception as error:  # whatever a missing compiler, header or CUDA toolkit comes out as
        needed = "a C++ compiler and ninja" if on_cpu else "nvcc of the CUDA version torch was built with"
        raise ConfigError(
            f"optim.fused: 'deepspeed': its {kind.__name__} could not be built ({_first_line(error)}); it needs "
            f"{needed}; install that, or use torch"
        ) from error
    return optimizer


def count_steps_by_parameter(optimizer: Optimizer) -> None:
    """Keep an optimizer's steps with each parameter, though it counts them by the group, as apex's FusedAdam does.

    ZeRO-3 cuts a group into parts and calls ``step`` once for each, which a group's counter takes for so many steps.
    """

    def before(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                group["step"] = optimizer.state[parameter].pop("step", 0)
                if not optimizer.state[parameter]:
                    del optimizer.state[parameter]

    def after(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in optimizer.state:
                    optimizer.state[parameter]["step"] = group["step"]

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _read_others(optimizer: Optimizer) -> None:
    """Let a state that another implementation has saved be loaded."""
    counts_in_tensors = isinstance(optimizer, torch.optim.AdamW)

    def mend(optimizer: Optimizer) -> None:
        own = {name: value for name, value in optimizer.defaults.items() if name not in _SHARED}
        for group in optimizer.param_groups:
            group.update(own)
        for state in optimizer.state.values():
            # torch's own has made tensors of numbers already.
            if "step" in state and not counts_in_tensors:
                state["step"] = int(state["step"])

    optimizer.register_load_state_dict_post_hook(mend)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
