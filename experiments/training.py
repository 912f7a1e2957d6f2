"""Pretraining and fine-tuning of a small model for the experiments.

A plain loop in one process of one thread, on the library's parts: the model is compared, not the engine.

Source: none.
"""

import copy
import math
import time
from collections.abc import Callable
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from unimo3.data.loader import ReaderArgs, TrainingLoader
from unimo3.data.order import SampleOrder
from unimo3.data.samples import Samples
from unimo3.errors import DivergedError
from unimo3.model.args import ModelArgs
from unimo3.model.config import Unimo3Config
from unimo3.model.initialization import initialize_weights
from unimo3.model.tokenizer_checks import resolve_tokens
from unimo3.model.unimo3 import Unimo3ForPreTraining, Unimo3PreTrainedModel
from unimo3.training.args import OptimArgs
from unimo3.training.evaluation import to_device
from unimo3.training.lr_schedule import lr_scale, set_lr

WINDOW_SHARDS = 8
READER = ReaderArgs(num_workers=0, prefetch=1)
PROGRESS_EVERY_S = 15.0


class Schedule(NamedTuple):
    """Of one stage of training.

    Attributes:
        name: for the progress, such as ``bridge seed 3: pretraining``.
        num_steps: optimizer steps.
        batch: pairs or questions a step.
        lr: peak learning rate.
        seed: of the order of the samples.
    """

    name: str
    num_steps: int
    batch: int
    lr: float
    seed: int


def train(
    task: nn.Module, samples: Samples, schedule: Schedule, build_optimizer: Callable[[Any, OptimArgs], Optimizer]
) -> dict[str, Any]:
    """Train; the mean loss of each tenth of the steps, and the median seconds of a step without reading.

    Args:
        task: batch -> ``loss``, by its ``model``.

    Raises:
        DivergedError: a loss is not finite.
    """
    name, num_steps, batch, lr, seed = schedule
    optim = OptimArgs(lr=lr, fusion_factor=1.0, head_factor=1.0)
    optimizer = build_optimizer(task.model, optim)
    order = SampleOrder(samples.units_per_shard, seed, WINDOW_SHARDS)
    batches = iter(TrainingLoader([samples], order, batch, batch, 0, 1, READER))
    losses: list[float] = []
    seconds: list[float] = []
    started = shown = time.perf_counter()
    task.train()
    for step in range(num_steps):
        (loaded,) = next(batches)
        inputs = to_device(loaded, torch.device("cpu"))
        before = time.perf_counter()
        set_lr(optimizer, lr_scale(step, num_steps, optim.warmup_ratio))
        loss = task(inputs)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), optim.clip_norm)
        optimizer.step()
        now = time.perf_counter()
        losses.append(loss.item())
        seconds.append(now - before)
        if not math.isfinite(losses[-1]):
            raise DivergedError(f"{name}: loss {losses[-1]} at step {step + 1}")
        if now - shown > PROGRESS_EVERY_S or step + 1 == num_steps:
            shown = now
            left_s = (now - started) / (step + 1) * (num_steps - step - 1)
            print(
                f"{name} step {step + 1}/{num_steps}, loss {losses[-1]:.3f}, {left_s:.0f} s left of this stage",
                flush=True,
            )
    tenths = [losses[num_steps * part // 10 : num_steps * (part + 1) // 10] for part in range(10)]
    return {"loss_by_tenth": [mean(tenth) for tenth in tenths if tenth], "step_s": median(seconds)}


def build_pretraining_model(
    args: ModelArgs,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    change: Callable[[Unimo3PreTrainedModel], None] | None = None,
) -> Unimo3ForPreTraining:
    """A model with its initial values, which depend on (seed, module name) alone.

    Args:
        change: what changes the model before it gets its values.
    """
    config = args.to_config()
    resolve_tokens(config, tokenizer)
    model = Unimo3ForPreTraining(config)
    if change:
        change(model)
    initialize_weights(model, seed, args.initializer_range)
    return model


def build_downstream_model(
    model_class: type[Unimo3PreTrainedModel],
    pretrained: Unimo3ForPreTraining,
    seed: int,
    change: Callable[[Unimo3PreTrainedModel], None] | None = None,
    **config_fields: Any,
) -> Any:
    """The pretrained towers and fusion encoder, and the heads that both models have; other heads are new.

    Args:
        change: what changes the model before it gets its values, as that of the pretrained one.
        config_fields: of the new model's configuration, such as ``num_answers``.
    """
    config: Unimo3Config = copy.deepcopy(pretrained.config)
    for name, value in config_fields.items():
        setattr(config, name, value)
    model = model_class(config)
    if change:
        change(model)
    initialize_weights(model, seed, config.initializer_range)
    names = model.state_dict().keys()
    model.load_state_dict({key: value for key, value in pretrained.state_dict().items() if key in names}, strict=False)
    return model


def on_cpu(task: nn.Module) -> nn.Module:
    """A task as evaluations take it: they ask an engine for its device."""
    task.device = torch.device("cpu")
    return task


def num_parameters(model: nn.Module) -> int:
    """Trainable values, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
