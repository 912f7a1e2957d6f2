"""The DeepSpeed engine, and the model that it trains.

Source: DeepSpeed 0.19, runtime/engine.py.
"""

import importlib
import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import deepspeed
import torch
from deepspeed.runtime import compiler
from torch import nn
from transformers.initialization import no_init_weights

from unimo3.distributed import world
from unimo3.engine import Engine
from unimo3.errors import ConfigError
from unimo3.kernels.args import KernelArgs
from unimo3.model.unimo3 import Unimo3Model, Unimo3PreTrainedModel
from unimo3.training.ds_config import offloads_optimizer
from unimo3.training.nvme import prepare_swap_folder
from unimo3.training.optim import OptimArgs, build_optimizer
from unimo3.training.parts import freeze_parts
from unimo3.training.quantization import part_errors

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Unimo3PreTrainedModel)


def build_model(ds_config: dict[str, Any], construct: Callable[[], Model]) -> Model:
    """Construct a model, sharded from its first parameter on under ZeRO-3, with its values still to be set."""
    with no_init_weights():
        if ds_config.get("zero_optimization", {}).get("stage") == 3:
            with deepspeed.zero.Init(config_dict_or_path=ds_config):
                model = construct()
        else:
            model = construct()
    model.tie_weights()  # transformers ties while it initializes, which was skipped above
    return model


def prepare_layers(
    model: Unimo3PreTrainedModel, kernels: KernelArgs, activation_checkpointing: bool, compile_towers: bool
) -> None:
    """Choose how layers run, before the engine is built around the model.

    Raises:
        ConfigError: a kernel asked for does not support the model or this machine.
    """
    width = model.config.hidden_size // model.config.num_attention_heads
    cast(Unimo3Model, model.unimo3).use_attention_kernel(kernels.attention_impl(width))
    kernels.choose_layer_norm(model)
    if activation_checkpointing:
        model.activation_checkpointing_enable()
    if compile_towers:
        cast(Unimo3Model, model.unimo3).compile_towers()


def build_engine(task: nn.Module, model: Unimo3PreTrainedModel, ds_config: dict[str, Any], optim: OptimArgs) -> Engine:
    """Start DeepSpeed on a task, whose `model` is to be trained.

    Raises:
        ConfigError: DeepSpeed refuses the configuration, ``optim.freeze`` does not fit the model, or the ds_config's
            folder on NVMe or its quantization cannot be used.
    """
    prepare_swap_folder(ds_config)
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
    if errors := part_errors(sizes, ds_config, world()[1]):
        raise ConfigError(errors)
    freeze_parts(model, optim)
    if optim.freeze and world()[0] == 0:
        num_trained = sum(sizes[name] for name, p in model.named_parameters() if p.requires_grad)
        log.info("optim.freeze: %s: %d of %d parameters train", optim.freeze, num_trained, sum(sizes.values()))
    optimizer = build_optimizer(model, optim, offloads_optimizer(ds_config))
    import_muon_uncompiled()
    try:
        engine, _, _, _ = deepspeed.initialize(model=task, optimizer=optimizer, config=ds_config)
    except (deepspeed.runtime.config.DeepSpeedConfigError, ValueError) as error:
        raise ConfigError(f"training.ds_config: DeepSpeed refuses it: {error}") from error
    return engine


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without compiling its kernels.

    DeepSpeed 0.19 asks of every optimizer whether it is Muon, and Muon's module applies ``torch.compile`` to three
    functions. That loads torch's inductor, 850 modules and seconds in every rank. No optimizer here is Muon.
    """
    stock = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = stock


def step_was_skipped(engine: Engine) -> bool:
    """Whether DeepSpeed skipped the last optimizer step, for a gradient that was not finite; the same on every rank."""
    return bool(getattr(engine.optimizer, "overflow", False))


def gradient_norm(engine: Engine) -> "torch.Tensor | float":
    """Global norm of the last step's gradient, not waited for; negative or nan if it is not finite."""
    norm = engine.get_global_grad_norm()
    return math.nan if norm is None else norm
