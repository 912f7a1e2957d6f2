"""What one training step costs: operations and memory, read off the step itself, run without values.

The real model and the real objective run forward and backward on torch's meta device, where tensors have a
shape and no content. Operations are counted by the formulas of torch's FlopCounterMode (the mode itself keeps
tensors alive, which would count as memory). Memory is the sum of all tensors alive, as an allocator would need it;
`memory` counts parameters and the gradients that ZeRO retains.

Source: torch/utils/flop_counter.py; torch/distributed/_tools/mem_tracker.py for counting live storages.
"""

# Shapes: B rows (pairs, questions, statements), T text tokens, S pixels a side.

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from unimo3.kernels.args import KernelArgs
from unimo3.model.config import Unimo3Config
from unimo3.model.unimo3 import Unimo3ForPreTraining, Unimo3Model, Unimo3PreTrainedModel
from unimo3.training.args import OptimArgs
from unimo3.training.engine import prepare_layers
from unimo3.training.parts import check_trains, freeze_parts
from unimo3.training.plan.gpu import GpuFunctions

# Two batch sizes separate what grows with the rows from what does not.
_FEW, _MANY = 32, 64

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """What a run computes in every step.

    Attributes:
        model: configuration, with the heads' classes.
        model_class: which has the heads.
        objective: model -> the module that an engine trains: batch -> ``loss`` and further metrics.
        batch: B -> a batch as the objective gets it, on the meta device; only positions of tokens and rows have
            values.
        kernels: which the run is to use; by default what a GPU uses.
        optim: which parts train.
        prepare: of a step with several micro-steps, runs first: (objective, micro-batches) -> what each gets in
            addition. None: nothing runs first.
    """

    model: Unimo3Config
    model_class: type[Unimo3PreTrainedModel]
    objective: Callable[[Any], nn.Module]
    batch: Callable[[int], Batch]
    kernels: KernelArgs = field(default_factory=KernelArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    prepare: Callable[[Any, list[Batch]], list[Batch]] | None = None

    def build(self, dtype: torch.dtype = torch.float32) -> Unimo3PreTrainedModel:
        """The model with shapes and no values, and parts of it frozen.

        Raises:
            ConfigError: no parameter is left to train.
        """
        model = build_on_meta(self.model, dtype, self.model_class)
        freeze_parts(model, self.optim)
        return model


@dataclass(frozen=True)
class StepCost:
    """One rank's forward and backward pass.

    Attributes:
        forward_flops: floating-point operations a row; a multiplication and an addition are two.
        backward_flops: the same; with activation checkpointing, what is computed again is among them.
        saved_bytes: a row's tensors alive between forward and backward pass.
        peak_bytes: a row's part of the most that is alive at once.
        fixed_bytes: what is alive then whatever the number of rows: mostly the largest gradient.
        prepare_flops: operations a row of what runs first in a step with several micro-steps.
        prepared_bytes: what that leaves alive for a row, until the last micro-step.
    """

    forward_flops: float
    backward_flops: float
    saved_bytes: float
    peak_bytes: float
    fixed_bytes: float
    prepare_flops: float = 0.0
    prepared_bytes: float = 0.0

    @property
    def flops(self) -> float:
        """Operations a row of the forward and the backward pass."""
        return self.forward_flops + self.backward_flops

    def prepare_flops_with(self, micro_batch: int, rank_batch: int) -> float:
        """Operations a row of what runs first, where a rank's rows of a step are this many."""
        return self.prepare_flops if micro_batch < rank_batch else 0.0

    def activation_bytes(self, micro_batch: int, rank_batch: int) -> float:
        """The most that is alive at once, where a rank's rows of a step are this many."""
        prepared_bytes = self.prepared_bytes * rank_batch if micro_batch < rank_batch else 0.0
        return micro_batch * self.peak_bytes + self.fixed_bytes + prepared_bytes


def build_on_meta(
    config: Unimo3Config,
    dtype: torch.dtype = torch.float32,
    model_class: type[Unimo3PreTrainedModel] = Unimo3ForPreTraining,
) -> Unimo3PreTrainedModel:
    """A model with shapes and no values."""
    with torch.device("meta"):
        model: nn.Module = model_class(config)
    return cast(Unimo3PreTrainedModel, model.to(dtype))


def blank_inputs(config: Unimo3Config, num_rows: int, num_tokens: int, num_images: int = 1) -> Batch:
    """Images [B, 3, S, S], or [B, images, 3, S, S] where a row has several, and texts [B, T], without values."""
    side = config.vision_config.image_size
    images = (num_images,) if num_images > 1 else ()
    ids = torch.empty(num_rows, num_tokens, dtype=torch.long, device="meta")
    pixels = torch.empty(num_rows, *images, 3, side, side, device="meta")
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids}


def trace_step(step: Step, dtype: torch.dtype, activation_checkpointing: bool) -> StepCost:
    """Run a training step without values.

    Args:
        dtype: of the weights in the step.
    """
    model = step.build(dtype)
    # apex's layer norm saves what torch's does.
    plain = KernelArgs(cross_layer_attention="reference", layer_norm="torch")
    prepare_layers(model, plain, activation_checkpointing, compile_towers=False)
    if step.kernels.supported_on_gpu(step.model.hidden_size // step.model.num_attention_heads):
        cast(Unimo3Model, model.unimo3).use_attention_kernel("triton")
    task = step.objective(model).train()
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        # ZeRO moves a gradient on as soon as it is complete.
        parameter.register_post_accumulate_grad_hook(_drop_grad)
    few, many = (_run(step, task, step.batch(size)) for size in (_FEW, _MANY))
    added = _MANY - _FEW
    peak_bytes = (many.peak_bytes - few.peak_bytes) / added
    return StepCost(
        forward_flops=many.forward_flops / _MANY,
        backward_flops=many.backward_flops / _MANY,
        saved_bytes=(many.saved_bytes - few.saved_bytes) / added,
        peak_bytes=peak_bytes,
        fixed_bytes=max(0.0, few.peak_bytes - _FEW * peak_bytes),
        prepare_flops=many.prepare_flops / _MANY,
        prepared_bytes=(many.prepared_bytes - few.prepared_bytes) / added,
    )


@dataclass(frozen=True)
class _Run:
    forward_flops: int
    backward_flops: int
    saved_bytes: int
    peak_bytes: int
    prepare_flops: int
    prepared_bytes: int


def _run(step: Step, task: nn.Module, batch: Batch) -> _Run:
    with GpuFunctions(), _Meter([*task.parameters(), *task.buffers()]) as meter:
        more = step.prepare(task, [batch])[0] if step.prepare else {}
        prepare_flops, prepared_bytes = meter.flops, meter.live_bytes
        loss = task(batch | more)["loss"]
        check_trains(loss, step.optim.freeze)
        forward_flops, saved_bytes = meter.flops - prepare_flops, meter.live_bytes - prepared_bytes
        _backward(loss)
    backward_flops = meter.flops - forward_flops - prepare_flops
    peak_bytes = meter.peak_bytes - prepared_bytes
    return _Run(forward_flops, backward_flops, saved_bytes, peak_bytes, prepare_flops, prepared_bytes)


def _backward(loss: Tensor) -> None:
    # The engine itself: in Tensor.backward the substitutions would be off, and checkpointed layers run again there.
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), accumulate_grad=True)


def _drop_grad(parameter: Tensor) -> None:
    parameter.grad = None


class _Meter(TorchDispatchMode):
    """Counts operations, and adds up the tensors made inside that are still alive.

    Args:
        excluded: tensors that do not count.
    """

    def __init__(self, excluded: list[Tensor]):
        super().__init__()
        self.flops = 0
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known = WeakIdKeyDictionary()
        for tensor in excluded:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # what an operation is made of is no function of the step
            out = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, Tensor) and part.is_meta:
                self._note(part.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known[storage] = True
            size = storage.nbytes()
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live_bytes -= size
