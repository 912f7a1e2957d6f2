"""What ZeRO allocates on one rank: weights, master weights, moments, gradients, gathered parameters and buffers.

DeepSpeed's parser of a ds_config decides what is partitioned over the ranks; the sizes below follow what its optimizers
allocate. tests/integration/test_plan.py compares them with a running engine's.

Source: DeepSpeed 0.19, runtime/zero/stage3.py, stage_1_and_2.py, partition_parameters.py,
partitioned_param_coordinator.py and, for stage 1 in bf16, runtime/bf16_optimizer.py.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from deepspeed.runtime.config import DtypeEnum
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from unimo3.dtypes import dtype_of
from unimo3.errors import ConfigError
from unimo3.model.unimo3 import Unimo3PreTrainedModel
from unimo3.training.optim import OptimArgs, parameter_groups
from unimo3.training.parts import parts_of

_FP32_BYTES = 4
# DeepSpeed's MIN_AIO_BYTES; a larger aio.block_size counts instead.
_SMALLEST_FILE_BYTES = 2**20
# Names of parts in a plan.
_ROLES = {"text_tower": "text", "vision_tower": "image"}


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of parameters; tied ones count once.

    Attributes:
        roles: of the towers, the fusion encoder and the heads; what a head shares counts for the tower.
        groups: of each trained parameter in each group of the optimizer.
        largest_module: of one module, its submodules not counted.
        frozen: of each parameter that does not train.
    """

    roles: dict[str, int]
    groups: list[list[int]]
    largest_module: int
    frozen: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.roles.values())

    @property
    def parameters(self) -> list[int]:
        """The size of each parameter, frozen ones last."""
        return [*(size for group in self.groups for size in group), *self.frozen]


def model_sizes(model: Unimo3PreTrainedModel, optim: OptimArgs | None = None) -> ModelSizes:
    """Count a complete model's parameters; it may be on the meta device, with parts of it frozen.

    Args:
        optim: which groups the optimizer has; None: those by default.
    """
    parts = {part: sum(p.numel() for p in parameters) for part, parameters in parts_of(model).items()}
    return ModelSizes(
        roles={_ROLES.get(part, part): size for part, size in parts.items()},
        groups=[[p.numel() for p in group["params"]] for group in parameter_groups(model, optim or OptimArgs())],
        largest_module=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()),
        frozen=[p.numel() for p in model.parameters() if not p.requires_grad],
    )


class Sharding:
    """How a ds_config shards, offloads and rounds.

    Attributes:
        gradient_bytes: of a number of an accumulated gradient.
        reduced_bytes: of a number of a gradient on its way between ranks.

    Args:
        ds_config: with DeepSpeed's keys; the batch sizes may be missing or "auto".

    Raises:
        ConfigError: gradients are to be accumulated or reduced in a type that DeepSpeed does not know.
    """

    def __init__(self, ds_config: dict[str, Any]):
        self.zero = DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {}))
        self.stage = int(self.zero.stage)
        self.precision = next((name for name in ("bf16", "fp16") if ds_config.get(name, {}).get("enabled")), "fp32")
        self.dtype = dtype_of(self.precision)
        self.weight_bytes = self.dtype.itemsize
        names = {"data_types.grad_accum_dtype": ds_config.get("data_types", {}).get("grad_accum_dtype")}
        names["communication_data_type"] = ds_config.get("communication_data_type")
        self.gradient_bytes, self.reduced_bytes = (_bytes_of(*item) or self.weight_bytes for item in names.items())
        self.offloads_weights = _offloads(self.zero.offload_param)
        self.offloads_optimizer = _offloads(self.zero.offload_optimizer)
        self.offloads_to_nvme = self.offloads_optimizer and self.zero.offload_optimizer.device == "nvme"
        self.secondary_ranks: int = self.zero.zero_hpz_partition_size
        self.quantizes = self.zero.zero_quantized_weights or self.zero.zero_quantized_gradients

    @property
    def offloads(self) -> bool:
        """Whether anything of a rank's state is in host memory."""
        return self.offloads_weights or self.offloads_optimizer


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank needs at any micro-batch.

    Attributes:
        device: on the GPU, by what they are for.
        host: in host memory, the same.
        nvme: in files on NVMe, the same.
        pass_bytes: on the GPU during the forward and backward pass alone.
        step_bytes: on the GPU during the optimizer's step alone.
    """

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    nvme: dict[str, int] = field(default_factory=dict)
    pass_bytes: dict[str, int] = field(default_factory=dict)
    step_bytes: int = 0

    def peak_bytes(self, activation_bytes: float) -> float:
        """Peak of the GPU, given what a micro-batch's forward and backward pass needs."""
        return sum(self.device.values()) + max(sum(self.pass_bytes.values()) + activation_bytes, self.step_bytes)


def rank_memory(sizes: ModelSizes, sharding: Sharding, num_ranks: int) -> RankMemory:
    """What DeepSpeed allocates on each of `num_ranks` ranks."""
    return (_stage_3 if sharding.stage == 3 else _stages_1_and_2)(sizes, sharding, num_ranks)


def _stage_3(sizes: ModelSizes, sharding: Sharding, num_ranks: int) -> RankMemory:
    # Each parameter is partitioned over the ranks separately.
    shards = [sum(math.ceil(size / num_ranks) for size in group) for group in sizes.groups]
    shard = sum(shards)
    zero = sharding.zero
    pieces = _sub_groups(sizes, sharding, num_ranks)
    in_files = sum(n for n in pieces if n * _FP32_BYTES >= _SMALLEST_FILE_BYTES) if sharding.offloads_to_nvme else 0
    # On their way to files, all float32 gradients of a rank are on the GPU.
    offloaded_step_bytes = in_files * _FP32_BYTES
    step_bytes = offloaded_step_bytes if sharding.offloads_optimizer else _step_bytes(shards, zero.sub_group_size)
    memory = RankMemory(step_bytes=step_bytes)
    weights = memory.host if sharding.offloads_weights else memory.device
    optimizer = memory.host if sharding.offloads_optimizer else memory.device
    frozen = sum(math.ceil(size / num_ranks) for size in sizes.frozen)
    weights["weights"] = (shard + frozen) * sharding.weight_bytes
    # A copy even of float32 weights.
    optimizer["master_weights"] = (shard - in_files) * _FP32_BYTES
    optimizer["moments"] = 2 * (shard - in_files) * _FP32_BYTES
    of_step = shard - in_files if sharding.offloads_optimizer else 0
    optimizer["gradients"] = shard * sharding.gradient_bytes + of_step * _FP32_BYTES
    if in_files:
        optimizer["swap_buffers"] = zero.offload_optimizer.buffer_count * max(pieces) * _FP32_BYTES
        for name, count in (("master_weights", 1), ("moments", 2), ("gradients", 1)):
            memory.nvme[name] = count * in_files * _FP32_BYTES
    gathered_for_use = gatherable_sizes(sizes, sharding)
    memory.device["persistent_weights"] = (sizes.total - sum(gathered_for_use)) * sharding.weight_bytes
    if sharding.secondary_ranks > 1:
        copy = sum(math.ceil(size / sharding.secondary_ranks) for size in gathered_for_use)
        during = memory.host if sharding.offloads_weights else memory.pass_bytes
        during["secondary_weights"] = copy * sharding.weight_bytes
    # A parameter stays gathered if it is needed again soon (the backward pass mirrors the forward pass, so what lies x
    # parameters before the turn is needed again after 2 x), or if the prefetcher, as far as it may look, comes upon it.
    gathered = max(zero.max_live_parameters, zero.max_reuse_distance // 2) + sizes.largest_module
    gathered = min(sum(gathered_for_use), gathered)
    memory.pass_bytes["gathered_weights"] = gathered * sharding.weight_bytes
    # The bucket, and its copy that the reduction reads.
    memory.pass_bytes["buckets"] = 2 * zero.reduce_bucket_size * sharding.weight_bytes
    return memory


def _sub_groups(sizes: ModelSizes, sharding: Sharding, num_ranks: int) -> list[int]:
    """Elements of a rank in each piece of a group of the optimizer that is stepped, and swapped, at once."""
    largest, pieces = sharding.zero.sub_group_size, []
    for group in sizes.groups:
        piece = 0
        for size in group:
            piece += math.ceil(size / num_ranks)
            if piece >= largest:
                pieces.append(piece)
                piece = 0
        pieces += [piece] if piece else []
    return pieces


def _stages_1_and_2(sizes: ModelSizes, sharding: Sharding, num_ranks: int) -> RankMemory:
    # Each group is one run of parameters, partitioned over the ranks at multiples of two.
    shards = [2 * math.ceil(sum(group) / (2 * num_ranks)) for group in sizes.groups]
    shard = sum(shards)
    zero = sharding.zero
    memory = RankMemory(step_bytes=0 if sharding.offloads_optimizer else _step_bytes(shards))
    optimizer = memory.host if sharding.offloads_optimizer else memory.device
    memory.device["weights"] = (shard * num_ranks + sum(sizes.frozen)) * sharding.weight_bytes
    optimizer["master_weights"] = shard * _FP32_BYTES
    optimizer["moments"] = 2 * shard * _FP32_BYTES
    accumulates_apart = sharding.gradient_bytes != sharding.weight_bytes
    staging_bytes = sharding.weight_bytes
    if sharding.offloads_optimizer:
        # Accumulated in the weights' type, given to the optimizer in float32, updated weights on their way back.
        optimizer["gradients"] = shard * (2 * sharding.weight_bytes + _FP32_BYTES)
        memory.device["gradients"] = max(map(max, sizes.groups)) * sharding.weight_bytes
    elif sharding.stage == 2:
        # Float32 accumulation has one buffer; any other copies reduced gradients first.
        first = 0 if accumulates_apart else sharding.weight_bytes
        memory.device["gradients"] = shard * (first + sharding.gradient_bytes)
    else:
        # Stage 1 accumulates full gradients; without float32 accumulation the optimizer gets a copy of its part.
        copied = 0 if accumulates_apart else shard
        memory.device["gradients"] = (shard * num_ranks + copied) * sharding.gradient_bytes
        staging_bytes = sharding.gradient_bytes
    num_buckets = 2 if zero.overlap_comm else 1
    memory.pass_bytes["buckets"] = num_buckets * zero.reduce_bucket_size * staging_bytes
    return memory


def _step_bytes(shards: list[int], most: int | float = math.inf) -> int:
    """AdamW steps through one group at a time: its gradient in float32, and one temporary of the same size."""
    return 2 * _FP32_BYTES * int(min(max(shards), most))


def gatherable_sizes(sizes: ModelSizes, sharding: Sharding) -> list[int]:
    """Sizes of parameters that are gathered for each use; smaller ones always are, as far as the total allows."""
    threshold, total = sharding.zero.param_persistence_threshold, sharding.zero.model_persistence_threshold
    num_persistent, gatherable = 0, []
    for size in sizes.parameters:
        if size <= threshold and num_persistent + size <= total:
            num_persistent += size
        else:
            gatherable.append(size)
    return gatherable


def _bytes_of(key: str, name: str | None) -> int | None:
    """Bytes a number of the type that a ds_config names; None: it names none."""
    try:
        dtype = DtypeEnum(name).value if name else None
    except ValueError as error:
        raise ConfigError(f"training.ds_config: '{key}': {name!r}: DeepSpeed knows no such type; use fp32") from error
    return None if dtype is None else int(dtype.itemsize)


def _offloads(section: Any) -> bool:
    return section is not None and section.device != "none"
