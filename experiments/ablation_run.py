"""One run of the ablation: a variant's model, pretraining, VQA fine-tuning, and their metrics.

A plain loop in one process of one thread, on the library's parts: the model is compared, not the engine.

Source: none.
"""

import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, cast

import torch
from torch import nn

from benchmarks.report import machine
from experiments.ablation_settings import Data, Settings
from finetune.task import score_batch
from finetune.vqa import Vqa
from unimo3.data.loader import ReaderArgs, TrainingLoader, evaluation_batches
from unimo3.data.order import SampleOrder
from unimo3.data.samples import Samples
from unimo3.distributed import World
from unimo3.errors import DivergedError
from unimo3.gate_map import gates_by_layer, mean_over_heads
from unimo3.metrics.groups import accuracy_by_group
from unimo3.model.args import ModelArgs, resolve_tokens
from unimo3.model.config import Unimo3Config
from unimo3.model.downstream import Unimo3ForVisualQuestionAnswering
from unimo3.model.initialization import initialize_weights
from unimo3.model.unimo3 import Unimo3ForPreTraining, Unimo3PreTrainedModel
from unimo3.objectives.args import ObjectivesArgs
from unimo3.objectives.base import PretrainingLoss
from unimo3.objectives.vqa import VqaLoss
from unimo3.training.evaluation import Unguarded, held_out_losses, to_device
from unimo3.training.lr_schedule import lr_scale, set_lr
from unimo3.training.optim import OptimArgs, build_optimizer

WINDOW_SHARDS = 8
READER = ReaderArgs(num_workers=0, prefetch=1)
PROGRESS_EVERY_S = 15.0


@dataclass(frozen=True)
class TrainingRun:
    """One variant with one seed."""

    settings: Settings
    variant: str
    seed: int

    def identity(self) -> dict[str, Any]:
        """What makes a finished run the same as another."""
        model = asdict(self.settings.model(self.variant))
        return {"variant": self.variant, "seed": self.seed, "settings": asdict(self.settings), "model": model}

    def file(self, work: Path) -> Path:
        """Where its result is saved."""
        return work / "finished" / f"{self.variant}-{self.seed}.json"

    def result(self, work: Path) -> dict[str, Any] | None:
        """Its result if it is done, with these settings."""
        file = self.file(work)
        saved: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return saved if self.identity().items() <= saved.items() else None

    def do(self, work: Path) -> None:
        """Compute the result and save it."""
        result = self.compute(Data(work, self.settings))
        file = self.file(work)
        file.parent.mkdir(parents=True, exist_ok=True)
        staging = file.with_suffix(".partial")
        staging.write_text(json.dumps(result) + "\n")
        staging.replace(file)

    def pretraining_task(self, data: Data) -> nn.Module:
        """Batch -> losses; its ``model`` is the model, with its initial values."""
        model = build_pretraining_model(self.settings.model(self.variant), data, self.seed)
        return PretrainingLoss(model, ObjectivesArgs().build(self.seed))

    def vqa_task(self, pretrained: nn.Module, num_answers: int) -> nn.Module:
        """Batch -> loss or logits; its ``model`` has the pretrained weights and a new head."""
        return VqaLoss(build_vqa_model(cast(Unimo3ForPreTraining, pretrained), num_answers, self.seed))

    def optimizer(self, model: nn.Module, args: OptimArgs) -> torch.optim.Optimizer:
        """AdamW over the model's parameters."""
        return build_optimizer(cast(Unimo3PreTrainedModel, model), args)

    def compute(self, data: Data) -> dict[str, Any]:
        """Pretrain, evaluate, fine-tune and evaluate."""
        torch.manual_seed(self.seed)
        task = self.pretraining_task(data)
        model: Any = task.model
        steps, rate = self.settings.pretraining_steps, self.settings.pretraining_lr
        pretraining = self._train("pretraining", task, model, data.pairs("train", self.seed), steps, rate)
        batch = self.settings.batch
        held_out = held_out_losses(
            on_cpu(task), data.pairs("val", self.seed), World(0, 0, 1), batch, READER, Unguarded()
        )
        assert held_out is not None
        config = model.config
        gates = {
            stream: mean_over_heads(gates_by_layer(weights, config.unimodal_levels)) if weights else None
            for stream in ("text", "image")
            for weights in [held_out.pop(f"gates_{stream}", None)]
        }

        answers = data.answers()
        vqa_task = self.vqa_task(model, len(answers))
        steps, rate = self.settings.vqa_steps, self.settings.vqa_lr
        vqa = self._train("VQA", vqa_task, vqa_task.model, data.questions("train", self.seed), steps, rate)
        asked = evaluation_batches(data.questions("val", self.seed), 0, 1, batch, READER)
        scored = [
            entry for loaded, counts in asked for entry in score_batch(Vqa(answers), on_cpu(vqa_task), loaded, counts)
        ]
        accuracy = accuracy_by_group((entry["groups"][1], entry["accuracy"]) for entry in scored)

        metrics = held_out | {f"vqa_{group}": value for group, value in accuracy.items()}
        return self.identity() | {
            "metrics": metrics,
            "gates": gates,
            "parameters": num_parameters(model),
            "pretraining": pretraining,
            "vqa": vqa,
            "machine": machine(),
        }

    def _train(
        self, stage: str, task: nn.Module, model: nn.Module, samples: Samples, num_steps: int, lr: float
    ) -> dict[str, Any]:
        """Train for `num_steps`; the loss of each tenth of them, and the median seconds of a step without reading."""
        optim = OptimArgs(lr=lr, fusion_factor=1.0, head_factor=1.0)
        optimizer = self.optimizer(model, optim)
        order = SampleOrder(samples.units_per_shard, self.seed, WINDOW_SHARDS)
        batch = self.settings.batch
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
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            optimizer.step()
            now = time.perf_counter()
            losses.append(loss.item())
            seconds.append(now - before)
            if not math.isfinite(losses[-1]):
                raise DivergedError(f"{self.variant}, seed {self.seed}: {stage} loss {losses[-1]} at step {step + 1}")
            if now - shown > PROGRESS_EVERY_S or step + 1 == num_steps:
                shown = now
                left_s = (now - started) / (step + 1) * (num_steps - step - 1)
                print(
                    f"{self.variant} seed {self.seed}: {stage} step {step + 1}/{num_steps}, loss {losses[-1]:.3f}, "
                    f"{left_s:.0f} s left of this stage",
                    flush=True,
                )
        tenths = [losses[num_steps * part // 10 : num_steps * (part + 1) // 10] for part in range(10)]
        return {"loss_by_tenth": [mean(tenth) for tenth in tenths if tenth], "step_s": median(seconds)}


def build_pretraining_model(args: ModelArgs, data: Data, seed: int) -> Unimo3ForPreTraining:
    """A model with its initial values, which depend on (seed, module name) alone."""
    config = args.to_config()
    resolve_tokens(config, data.tokenizer())
    model = Unimo3ForPreTraining(config)
    initialize_weights(model, seed, args.initializer_range)
    return model


def build_vqa_model(pretrained: Unimo3ForPreTraining, num_answers: int, seed: int) -> Unimo3ForVisualQuestionAnswering:
    """The pretrained towers and fusion encoder under a new head."""
    config: Unimo3Config = copy.deepcopy(pretrained.config)
    config.num_answers = num_answers
    model = Unimo3ForVisualQuestionAnswering(config)
    initialize_weights(model, seed, config.initializer_range)
    model.unimo3.load_state_dict(pretrained.unimo3.state_dict())
    return model


def on_cpu(task: nn.Module) -> nn.Module:
    """A task as evaluations take it: they ask an engine for its device."""
    task.device = torch.device("cpu")
    return task


def num_parameters(model: nn.Module) -> int:
    """Trainable values, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
