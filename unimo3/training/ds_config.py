"""A ds_config, its errors, and how the recipe completes it; the only module that reads ``ds_configs/``.

A ds_config decides how to shard, offload and round. The recipe decides batch sizes and gradient clipping, which are
"auto" in a ds_config. A ds_config that sets them to another value is refused: two sources for one number would hide
which one a run used.

Source: DeepSpeed 0.19, runtime/config.py.
"""

import difflib
import json
from dataclasses import dataclass
from typing import Any

from unimo3.errors import ConfigError
from unimo3.project_files import package_folder, project_file
from unimo3.training.quantization import quantization_errors, quantizes

DS_CONFIGS = package_folder("ds_configs")
"""Folder of the configurations that come with the project."""
# Keys of a ds_config whose values are settings of the recipe.
_BY_RECIPE = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
# The key whose value is a folder of this run, on the disk that training.nvme_path names.
_OF_NVME = "nvme_path"
_REMOVED = ("elasticity", "nebula", "compression_training", "autotuning", "optimizer", "scheduler")


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is spread: `global_batch` = `micro_batch` x `num_accumulation` x `world_size`.

    Attributes:
        contrasts: whether the loss compares the pairs of a micro-step with each other, as ITC and ITM do.
    """

    global_batch: int
    micro_batch: int
    world_size: int
    contrasts: bool = False

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
        return errors + self.contrast_errors()

    def contrast_errors(self) -> list[str]:
        """Return an error if a micro-step has a single pair, which ITC and ITM compare with nothing."""
        if not self.contrasts or self.micro_batch * self.world_size != 1:
            return []
        return [
            f"training.micro_batch: {self.micro_batch}: ITC and ITM draw negatives from one micro-step over all "
            "ranks, which needs at least 2 pairs"
        ]


def file_errors(path: str) -> list[str]:
    """Return the errors of a ds_config file that are found without DeepSpeed, one line each."""
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
        if key == _OF_NVME and value != "auto":
            errors.append(f"{where}: sets '{key}' to {value!r}; set it to \"auto\": training.nvme_path decides it")
        if value == "auto" and key not in (*_BY_RECIPE, _OF_NVME):
            errors.append(
                f"{where}: '{key}' is \"auto\"; only {', '.join(_BY_RECIPE)} are filled in, DeepSpeed drops others"
            )
    for section in ("fp16", "bf16", "zero_optimization"):
        if not isinstance(config.get(section, {}), dict):
            return [*errors, f"{where}: '{section}': {config[section]!r}: an object is needed; see zero3_bf16.json"]
    if isinstance(config.get("checkpoint"), dict) and config["checkpoint"].get("use_node_local_storage"):
        errors.append(
            f"{where}: 'checkpoint.use_node_local_storage' is true: parts of a checkpoint on each node's own disk "
            "can be neither verified nor resumed on other ranks; remove it, and put run.dir on shared storage"
        )
    return errors + [f"{where}: {problem}" for problem in _offload_errors(config) + quantization_errors(config)]


def nvme_errors(path: str, nvme_path: str) -> list[str]:
    """Return an error if a ds_config without `file_errors` needs a folder on NVMe and has none, or has one in vain."""
    if offloads_to_nvme(_read(path)):
        if nvme_path:
            return []
        return [
            f"training.nvme_path: '': '{path}' keeps the optimizer's states on NVMe; name a folder on a local disk of "
            "every node"
        ]
    return [f"training.nvme_path: '{nvme_path}': '{path}' keeps nothing on NVMe; leave it out"] if nvme_path else []


def engine_errors(path: str) -> list[str]:
    """Return what DeepSpeed or this machine refuses of a ds_config without `file_errors`, one line per error."""
    import torch

    config, where = _read(path), f"training.ds_config: '{path}'"
    errors = [f"{where}: {problem}" for problem in _zero_errors(config.get("zero_optimization", {}))]
    if config.get("fp16", {}).get("enabled") and not torch.cuda.is_available():
        errors.append(f"{where}: fp16 needs a GPU; on CPU use zero3_fp32.json")
    if (quantized := quantizes(config)) and not torch.cuda.is_available():
        errors.append(f"{where}: {' and '.join(quantized)}: DeepSpeed quantizes on GPUs alone; on CPU remove it")
    return errors


def read_ds_config(path: str, batch: BatchPlan, clip_norm: float, swap_folder: str = "") -> dict[str, Any]:
    """A ds_config with the recipe's batch sizes and clipping filled in.

    Args:
        swap_folder: where DeepSpeed puts what it offloads to NVMe, if it does.

    Raises:
        ConfigError: the file is missing or no JSON object.
    """
    config = _read(path)
    if swap_folder and offloads_to_nvme(config):
        config["zero_optimization"]["offload_optimizer"][_OF_NVME] = swap_folder
    # optim.fused decides which AdamW runs; DeepSpeed would refuse torch's under offload.
    return (
        {"zero_force_ds_cpu_optimizer": False}
        | config
        | {
            "train_batch_size": batch.global_batch,
            "train_micro_batch_size_per_gpu": batch.micro_batch,
            "gradient_accumulation_steps": batch.num_accumulation,
            "gradient_clipping": clip_norm,
        }
    )


def offloads_optimizer(ds_config: dict[str, Any]) -> bool:
    """Whether a ds_config keeps the optimizer's state outside the GPU."""
    return _device(ds_config, "offload_optimizer") != "none"


def offloads_to_nvme(ds_config: dict[str, Any]) -> bool:
    """Whether a ds_config keeps the optimizer's state on NVMe."""
    return _device(ds_config, "offload_optimizer") == "nvme"


def _device(ds_config: dict[str, Any], section: str) -> Any:
    offload = ds_config.get("zero_optimization", {}).get(section)
    return offload.get("device", "none") if isinstance(offload, dict) else "none"


def _offload_errors(config: dict[str, Any]) -> list[str]:
    if _device(config, "offload_param") == "nvme":
        return [
            "'zero_optimization.offload_param.device': 'nvme': weights on NVMe cannot be saved in a checkpoint; set "
            "it to 'cpu', and offload_optimizer.device alone to 'nvme'"
        ]
    if offloads_to_nvme(config) and config["zero_optimization"].get("stage") != 3:
        return ["'zero_optimization.offload_optimizer.device': 'nvme': DeepSpeed needs stage 3 for it; set stage to 3"]
    return []


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
            errors.append("'zero_optimization.stage': 0: ZeRO is off; use stage 3, 2 or 1, which checkpoints require")
    return errors


def _hint(close: list[str]) -> str:
    return f"did you mean {close[0]}?" if close else "remove it"


def _read(path: str) -> dict[str, Any]:
    try:
        config = json.loads(project_file(path).read_text())
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
