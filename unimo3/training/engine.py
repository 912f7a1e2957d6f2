"""The DeepSpeed engine: the only module that reads ``ds_configs/`` and starts DeepSpeed.

A ds_config decides how to shard, offload and round. The recipe decides batch sizes and gradient clipping, which are
"auto" in a ds_config. A ds_config that sets them to another value is refused: two sources for one number would hide
which one a run used. DeepSpeed takes seconds to import, so functions import it that use it.

Source: DeepSpeed 0.19, runtime/config.py and runtime/engine.py.
"""

import difflib
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers.initialization import no_init_weights

from unimo3.engine import Engine
from unimo3.errors import ConfigError
from unimo3.kernels.args import KernelArgs
from unimo3.model.unimo3 import Unimo3Model, Unimo3PreTrainedModel
from unimo3.training.optim import OptimArgs, build_optimizer

Model = TypeVar("Model", bound=Unimo3PreTrainedModel)

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
"""Folder of the configurations that come with the project."""
# Keys of a ds_config whose values are settings of the recipe.
_BY_RECIPE = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_REMOVED = ("elasticity", "nebula", "compression_training", "autotuning", "optimizer", "scheduler")


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is spread: `global_batch` = `micro_batch` x `num_accumulation` x `world_size`."""

    global_batch: int
    micro_batch: int
    world_size: int

    @property
    def num_accumulation(self) -> int:
        """Micro-steps an optimizer step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def validate(self) -> list[str]:
        """Return the errors of these numbers, one line each."""
        errors = [
            f"training.{name}: {value}: at least 1 pair is needed"
            for name, value in (("global_batch", self.global_batch), ("micro_batch", self.micro_batch))
            if value < 1
        ]
        if not errors and self.global_batch % (self.micro_batch * self.world_size):
            pairs = self.micro_batch * self.world_size
            below, above = self.global_batch // pairs * pairs, (self.global_batch // pairs + 1) * pairs
            errors.append(
                f"training.global_batch: {self.global_batch}: does not divide into micro-batches of "
                f"{self.micro_batch} on {self.world_size} ranks; use {f'{below} or ' if below else ''}{above}, "
                "or change training.micro_batch or the number of ranks"
            )
        return errors

    def contrast_errors(self) -> list[str]:
        """Return an error if a micro-step has a single pair, which ITC and ITM compare with nothing."""
        if self.micro_batch * self.world_size != 1:
            return []
        return [
            f"training.micro_batch: {self.micro_batch}: contrast and matching draw wrong partners in a micro-step, "
            "over all ranks; at least 2 pairs are needed there"
        ]


def ds_config_errors(path: str) -> list[str]:
    """Return the errors of a ds_config file, one line each."""
    try:
        config = _read(path)
    except ConfigError as error:
        return error.errors
    where = f"training.ds_config: '{path}'"
    errors = [
        f"{where}: sets '{key}' to {config[key]!r}; set it to \"auto\": the recipe decides it"
        for key in _BY_RECIPE
        if config.get(key, "auto") != "auto"
    ]
    errors += [f"{where}: has '{key}', which this project does not use; remove it" for key in _REMOVED if key in config]
    for key, value in _walk(config):
        if value == "auto" and key not in _BY_RECIPE:
            errors.append(
                f"{where}: '{key}' is \"auto\"; only {', '.join(_BY_RECIPE)} are filled in, DeepSpeed drops others"
            )
    for section in ("fp16", "bf16", "zero_optimization"):
        if not isinstance(config.get(section, {}), dict):
            return [*errors, f"{where}: '{section}': {config[section]!r}: an object is needed; see zero3_bf16.json"]
    errors += [f"{where}: {problem}" for problem in _zero_errors(config.get("zero_optimization", {}))]
    if isinstance(config.get("checkpoint"), dict) and config["checkpoint"].get("use_node_local_storage"):
        errors.append(
            f"{where}: 'checkpoint.use_node_local_storage' is true: parts of a checkpoint on each node's own disk "
            "can be neither verified nor resumed on other ranks; remove it, and put run.dir on shared storage"
        )
    if config.get("fp16", {}).get("enabled") and not torch.cuda.is_available():
        errors.append(f"{where}: fp16 needs a GPU; on CPU use zero3_fp32.json")
    return errors


def read_ds_config(path: str, batch: BatchPlan, clip_norm: float) -> dict[str, Any]:
    """A ds_config with the recipe's batch sizes and clipping filled in.

    Raises:
        ConfigError: the file is missing or no JSON object.
    """
    # optim.fused decides which AdamW runs; DeepSpeed would refuse torch's under offload.
    return (
        {"zero_force_ds_cpu_optimizer": False}
        | _read(path)
        | {
            "train_batch_size": batch.global_batch,
            "train_micro_batch_size_per_gpu": batch.micro_batch,
            "gradient_accumulation_steps": batch.num_accumulation,
            "gradient_clipping": clip_norm,
        }
    )


def build_model(ds_config: dict[str, Any], construct: Callable[[], Model]) -> Model:
    """Construct a model, sharded from its first parameter on under ZeRO-3, with its values still to be set."""
    import deepspeed

    with no_init_weights():
        if ds_config.get("zero_optimization", {}).get("stage") == 3:
            with deepspeed.zero.Init(config_dict_or_path=ds_config):
                model = construct()
        else:
            model = construct()
    model.tie_weights()  # transformers ties while it initialises, which was skipped above
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
        ConfigError: DeepSpeed refuses the configuration.
    """
    import deepspeed

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
    from deepspeed.runtime import compiler

    stock = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = stock


def step_was_skipped(engine: Engine) -> bool:
    """Whether DeepSpeed skipped the last optimizer step, for a gradient that was not finite; the same on every rank."""
    return bool(getattr(engine.optimizer, "overflow", False))


def offloads_optimizer(ds_config: dict[str, Any]) -> bool:
    """Whether a ds_config keeps the optimizer's state outside the GPU."""
    section = ds_config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return section.get("device", "none") != "none"


def _zero_errors(section: dict[str, Any]) -> list[str]:
    """Errors that DeepSpeed would raise for a ds_config's ZeRO section, and unknown keys it would drop silently."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    errors = []
    for key in sorted(set(section) - known):
        close = difflib.get_close_matches(key, known, n=1)
        errors.append(f"'zero_optimization.{key}': DeepSpeed knows no such key; {_hint(close)}")
    values = {key: value for key, value in section.items() if key in known and value != "auto"}
    try:
        stage = DeepSpeedZeroConfig(**values).stage
    except ValueError as error:
        errors.append(f"'zero_optimization': DeepSpeed refuses it: {error}")
    else:
        if stage < 1 and section.get("stage") != "auto":
            errors.append("'zero_optimization.stage': 0: ZeRO is off; use 3, or 2 or 1, on which checkpoints rest")
    return errors


def _hint(close: list[str]) -> str:
    return f"did you mean {close[0]}?" if close else "remove it"


def gradient_norm(engine: Engine) -> float:
    """Global norm of the last step's gradient; nan if it is not finite, for which DeepSpeed returns -1 or None."""
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None and float(norm) >= 0 else math.nan


def _read(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(
            f"training.ds_config: '{path}': cannot be read ({error.strerror}); name a file of ds_configs/"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"training.ds_config: '{path}': is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"training.ds_config: '{path}': contains no JSON object; see ds_configs/zero3_bf16.json")
    return config


def _walk(config: dict[str, Any]) -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in config.items():
        items += _walk(value) if isinstance(value, dict) else [(key, value)]
    return items
