"""A ZeRO checkpoint of any number of ranks -> the running engine of another number.

Each rank reads its elements under the new partitioning, parameter by parameter, from the files of the ranks that wrote
them: float32 weights, moments, frozen parameters, buffers. Then the half-precision copies are made of the float32 ones,
as an optimizer step does. Of states on NVMe, the files are written; no other file is. In addition to the engine, memory
is bounded by the largest parameter.

Source: DeepSpeed 0.19, runtime/zero/stage3.py and runtime/zero/stage_1_and_2.py for the layout of an optimizer's state.
"""

from typing import Any

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from unimo3.checkpoint.swapped import mapped_states
from unimo3.checkpoint.torch_file import StoredTensor, close_files
from unimo3.checkpoint.zero_reader import WEIGHTS, ZeroCheckpoint
from unimo3.distributed import world
from unimo3.engine import Engine
from unimo3.errors import CheckpointError

# These decide how an optimizer computes its step, not what: the engine's values stay.
_IMPLEMENTATION = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})


def load_elastic(engine: Engine, source: ZeroCheckpoint) -> None:
    """Restore an engine of any number of ranks from a verified checkpoint; every rank calls it.

    What is collective is left to the caller, when all ranks have succeeded: under ZeRO-3 persistent parameters are
    gathered again by the optimizer's ``checkpoint_event_epilogue``, under ZeRO-2 all weights by `gather_weights`.

    Raises:
        CheckpointError: the checkpoint is of another model or stage.
    """
    optimizer = engine.optimizer
    _check(source, engine)
    if source.stage == 3:
        optimizer.checkpoint_event_prologue()  # partitions all parameters, as before DeepSpeed's load
        with mapped_states(optimizer, source.moments):
            _fill_stage3(source, optimizer, {parameter: name for name, parameter in engine.module.named_parameters()})
    else:
        _fill_stage2(source, optimizer, dict(engine.module.named_parameters()))
    _fill_frozen(source, engine.module)
    _fill_buffers(source, engine.module)
    _restore_groups(source, optimizer.optimizer.param_groups)
    for name in ("loss_scaler", "dynamic_loss_scale", "overflow"):
        if name in source.optimizer:
            setattr(optimizer, name, source.optimizer[name])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, source.model[name])
    close_files()  # a pruned file leaves the disk only when it is closed


def _check(source: ZeroCheckpoint, engine: Engine) -> None:
    optimizer = engine.optimizer
    kind = DeepSpeedZeroOptimizer_Stage3 if source.stage == 3 else DeepSpeedZeroOptimizer
    if not isinstance(optimizer, kind):
        raise CheckpointError(
            f"{source.folder}: resuming at another number of ranks is supported for ZeRO-2 and ZeRO-3, not for "
            f"DeepSpeed's {type(optimizer).__name__}; start with {source.world_size} ranks"
        )
    if getattr(optimizer, "round_robin_gradients", False):
        raise CheckpointError(
            f"{source.folder}: resuming at another number of ranks is not supported with round_robin_gradients, under "
            f"which DeepSpeed orders parameters differently; start with {source.world_size} ranks, or set it to false"
        )
    here = {name: _shape(parameter) for name, parameter in engine.module.named_parameters()}
    saved = {**source.trained, **source.frozen}
    # Under ZeRO-2 DeepSpeed lists no frozen parameters: they are complete among the module's values.
    errors = [
        f"{name} is {tuple(saved[name]) if name in saved else 'missing'} there, {tuple(here[name])} here"
        if name in here
        else f"{name} is no part of this model"
        for name in sorted(here.keys() | saved.keys())
        if here.get(name) != saved.get(name)
    ]
    if errors:
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise CheckpointError(f"{source.folder}: was written by another model: {'; '.join(errors[:3])}{more}")


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _fill_stage3(source: ZeroCheckpoint, optimizer: Any, names: dict[nn.Parameter, str]) -> None:
    for number, group in enumerate(optimizer.fp16_groups):
        flat: Tensor = optimizer.fp32_partitioned_groups_flat[number]
        state = _state_of(source, optimizer.optimizer, flat, optimizer.sub_group_to_group_id[number])
        for kind in (WEIGHTS, *source.moments):
            target = flat.data if kind == WEIGHTS else state[kind]
            target.zero_()  # ends of parts are padding
            offset = 0
            for parameter in group:
                first, count = _local_part(parameter)
                target[offset : offset + count].copy_(source.fragment(names[parameter], first, count, kind))
                offset += parameter.partition_numel()
        if flat.numel():
            optimizer.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
        parts = optimizer.fp16_partitioned_groups[number]
        unflattened = optimizer.unflatten(optimizer.fp16_partitioned_groups_flat[number], parts)
        for part, values in zip(parts, unflattened, strict=True):
            part.data = values.data


def _local_part(parameter: Any) -> tuple[int, int]:
    """First element and number of elements of this rank's part of a ZeRO-3 parameter."""
    part = parameter.partition_numel()
    first = min(parameter.ds_numel, part * world()[0])
    return first, min(part, parameter.ds_numel - first)


def _fill_stage2(source: ZeroCheckpoint, optimizer: Any, parameters: dict[str, nn.Parameter]) -> None:
    flats = optimizer.single_partition_of_fp32_groups
    states = [_state_of(source, optimizer.optimizer, flat, group) for group, flat in enumerate(flats)]
    for name in source.trained:
        parameter: Any = parameters[name]
        mapping = parameter._hp_mapping
        if mapping is None:
            continue  # none of it is this rank's
        group, hp, lp = mapping.param_group_index, mapping.hp_fragment_address, mapping.lp_fragment_address
        part = slice(hp.start, hp.start + hp.numel)
        flats[group].data[part].copy_(source.fragment(name, lp.start, lp.numel))
        for kind in source.moments:
            states[group][kind][part].copy_(source.fragment(name, lp.start, lp.numel, kind))


def gather_weights(optimizer: Any) -> None:
    """Under ZeRO-2, make all half-precision weights of the ranks' float32 ones, as a step does; every rank calls it."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.update_lp_params()


def _state_of(source: ZeroCheckpoint, optimizer: torch.optim.Optimizer, flat: Tensor, group: int) -> dict[str, Any]:
    """The optimizer's state of a flat partition, with what the checkpoint has for all of a group, such as ``step``."""
    state: dict[str, Any] = optimizer.state[flat]
    saved = source.base_state()
    number = saved["param_groups"][group]["params"][0]
    for name, value in saved["state"].get(number, {}).items():
        if name in source.moments:
            state.setdefault(name, torch.zeros_like(flat))
            continue
        value = value.read() if isinstance(value, StoredTensor) else value
        if isinstance(state.get(name), Tensor):
            state[name].copy_(torch.as_tensor(value))
        else:
            state[name] = value
    return state


def _fill_frozen(source: ZeroCheckpoint, module: nn.Module) -> None:
    parameters: dict[str, Any] = dict(module.named_parameters())
    for name in source.frozen:
        parameter = parameters[name]
        if hasattr(parameter, "ds_id"):
            first, count = _local_part(parameter)
            parameter.ds_tensor.data.view(-1)[:count].copy_(source.fragment(name, first, count))
        else:
            parameter.data.copy_(source.tensor(name))


def _fill_buffers(source: ZeroCheckpoint, module: nn.Module) -> None:
    buffers = dict(module.named_buffers())
    for name in source.buffers:
        if name not in buffers:
            raise CheckpointError(f"{source.folder}: has a buffer {name}, which is no part of this model")
        buffers[name].copy_(source.tensor(name))


def _restore_groups(source: ZeroCheckpoint, groups: list[dict[str, Any]]) -> None:
    saved = source.base_state()["param_groups"]
    if len(saved) != len(groups):
        raise CheckpointError(f"{source.folder}: has {len(saved)} parameter groups, this run has {len(groups)}")
    for group, before in zip(groups, saved, strict=True):
        group.update({name: value for name, value in before.items() if name not in _IMPLEMENTATION})
