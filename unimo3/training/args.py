"""Settings of the training loop and of its optimizer."""

import math
from dataclasses import dataclass, field
from typing import Literal

from unimo3.config import Checked
from unimo3.training import ds_config
from unimo3.training.lr_schedule import SCHEDULES

Fused = Literal["auto", "apex", "deepspeed", "torch"]
TOWERS = ("text_tower", "vision_tower")
PARTS = (*TOWERS, "fusion", "heads")
"""What of a model can be frozen. fusion: all between the towers and the heads."""
_DECAY_RATIO = 0.1


@dataclass(frozen=True)
class OptimArgs:
    """AdamW and its learning rate."""

    lr: float = 1e-5
    """Peak learning rate of the towers."""
    tower_layer_decay: float = 1.0
    """Factor of the rate from each layer of a tower to the one below it: layer k of n has `lr` times this to the power
    n - k, and the embeddings the power n. 1: all layers have `lr`."""
    fusion_factor: float = 5.0
    """Factor of `lr` for the fusion encoder."""
    head_factor: float = 5.0
    """Factor of `lr` for the heads."""
    weight_decay: float = 0.01
    """Decay of weight matrices; biases, norms and single parameters have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    warmup_ratio: float = 0.1
    """Fraction of all steps over which the rate rises linearly from zero."""
    schedule: str = "linear"
    """The rate after that. linear, cosine: falls to zero at the last step. constant: stays at the peak. wsd
    (warm-up, stable, decay): stays at the peak, and falls linearly to zero over the last steps, see `decay_ratio`."""
    decay_ratio: float = _DECAY_RATIO
    """Fraction of all steps, at the end, over which the rate of wsd falls to zero. For no other schedule."""
    freeze: list[dict[str, int] | str] = field(default_factory=list)
    """Parts that do not train, of text_tower, vision_tower, fusion (with projections and poolers) and heads. A number
    freezes a tower's embeddings and that many of its lowest layers: [text_tower: 6, vision_tower]."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    fused: Fused = "auto"
    """Whose fused kernels run the update. apex: NVIDIA apex's FusedAdam. deepspeed: DeepSpeed's CPUAdam where the
    ds_config offloads the optimizer or there is no GPU, else its FusedAdam; both are compiled when first used. torch:
    torch's AdamW. auto: deepspeed for an offloaded optimizer, apex on a GPU where it is installed, else torch."""

    def validate(self) -> list[str]:
        """Return the errors of these settings, one line each."""
        errors = []
        for name in ("lr", "fusion_factor", "head_factor", "eps"):
            if getattr(self, name) <= 0:
                errors.append(f"optim.{name}: {getattr(self, name)}: a number above 0 is needed")
        if not 0 < self.tower_layer_decay <= 1:
            errors.append(f"optim.tower_layer_decay: {self.tower_layer_decay}: above 0 and at most 1 is needed")
        elif self.tower_layer_decay != 1 and all(self.frozen.get(tower, 0) is None for tower in TOWERS):
            errors.append(
                f"optim.tower_layer_decay: {self.tower_layer_decay}: has no effect, optim.freeze freezes both towers; "
                "leave it out"
            )
        for name in ("weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                errors.append(f"optim.{name}: {getattr(self, name)}: 0 or more is needed")
        for name in ("beta1", "beta2", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                errors.append(f"optim.{name}: {getattr(self, name)}: at least 0 and below 1 is needed")
        if self.schedule not in SCHEDULES:
            errors.append(f"optim.schedule: '{self.schedule}': one of {', '.join(SCHEDULES)} is needed")
        elif self.schedule != "wsd" and self.decay_ratio != _DECAY_RATIO:
            errors.append(
                f"optim.decay_ratio: {self.decay_ratio}: only wsd reads it, optim.schedule is {self.schedule}; set "
                "that to wsd or leave this out"
            )
        elif not (self.decay_ratio > 0 and self.warmup_ratio + self.decay_ratio <= 1 + 1e-9):
            errors.append(
                f"optim.decay_ratio: {self.decay_ratio}: above 0 and at most {1 - self.warmup_ratio:g}, what "
                "optim.warmup_ratio leaves, is needed"
            )
        return errors + self._freeze_errors()

    @property
    def frozen(self) -> dict[str, int | None]:
        """Each frozen part, in the order of `PARTS`, and how many of a tower's lowest layers; None: all of it."""
        parts: dict[str, int | None] = {}
        for entry in self.freeze:
            parts |= entry if isinstance(entry, dict) else {entry: None}
        return {part: parts[part] for part in PARTS if part in parts}

    def _freeze_errors(self) -> list[str]:
        errors = []
        names = [name for entry in self.freeze for name in (entry if isinstance(entry, dict) else [entry])]
        errors = [
            f"optim.freeze: '{name}': no such part; one of {', '.join(PARTS)}, or a tower with a number of layers, "
            "such as {text_tower: 6}, is needed"
            for name in dict.fromkeys(names)
            if name not in PARTS
        ]
        errors += [
            f"optim.freeze: {name}: named {names.count(name)} times; name it once"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
        for entry in self.freeze:
            for name, num_layers in entry.items() if isinstance(entry, dict) else ():
                if name in PARTS and name not in TOWERS:
                    errors.append(f"optim.freeze: {name}: {num_layers}: only towers have layers to count; write {name}")
                elif name in TOWERS and num_layers < 0:
                    errors.append(f"optim.freeze: {name}: {num_layers}: 0 (embeddings alone) or more is needed")
        if not errors and list(self.frozen.values()) == [None] * len(PARTS):
            errors.append(f"optim.freeze: {self.freeze}: no parameter is left to train; leave a part out")
        return errors


@dataclass(frozen=True)
class TrainingArgs(Checked):
    """Length, batch and engine of the run."""

    steps: int = 100_000
    """Optimizer steps of the complete run, over which the learning rate follows its schedule."""
    stop_after: int = 0
    """Optimizer steps after which this process saves and exits with status 0, short of `steps`. 0: at `steps`."""
    global_batch: int = 4096
    """Pairs an optimizer step, over all ranks; constant in a run."""
    micro_batch: int = 32
    """Pairs one rank computes at a time."""
    ds_config: str = "ds_configs/zero3_bf16.json"
    """DeepSpeed configuration file."""
    nvme_path: str = ""
    """Folder on a local NVMe disk of every node, for the optimizer's states where the ds_config offloads them to NVMe.
    Each run has a folder of its own in it, which no checkpoint needs."""
    activation_checkpointing: bool = False
    """Whether layers save only their inputs for the backward pass and compute the rest again: less memory, about a
    third more time."""
    compile_towers: bool = False
    """Whether both towers are compiled with torch.compile at the first step; needs a compiler on every node."""
    eval_every: int = 0
    """Optimizer steps between evaluations on held-out data. 0: at the end alone."""
    stall_after_s: float = 900.0
    """Seconds without progress after which a rank writes its stack traces and the process exits with status 71, to be
    started again; four times as long while starting or saving. More than the longest step. 0: never."""
    max_skipped: int = 10
    """Optimizer steps in a row that are skipped for a loss or gradient that is not finite; one more ends the run with
    status 70. Under fp16 a gradient alone does not count: its loss scaling expects that."""
    log_every: int = 50
    """Optimizer steps between progress lines where the output is no terminal, and between gate maps."""
    gate_heads: bool = False
    """Whether TensorBoard's gate maps show each head in addition to the mean of the heads."""

    def slow_errors(self) -> list[str]:
        """Return what DeepSpeed or this machine refuses of the ds_config, one line per error."""
        return ds_config.engine_errors(self.ds_config)

    def quick_errors(self) -> list[str]:
        """Return the other errors of these settings, one line each."""
        errors = [
            f"training.{name}: {getattr(self, name)}: at least 1 is needed"
            for name in ("steps", "log_every")
            if getattr(self, name) < 1
        ]
        errors += [
            f"training.{name}: {getattr(self, name)}: 0 or a number of steps is needed"
            for name in ("stop_after", "eval_every", "max_skipped")
            if getattr(self, name) < 0
        ]
        if not 0 <= self.stall_after_s < math.inf:
            errors.append(f"training.stall_after_s: {self.stall_after_s}: 0 or a number of seconds is needed")
        errors += (of_file := ds_config.file_errors(self.ds_config))
        return errors if of_file else errors + ds_config.nvme_errors(self.ds_config, self.nvme_path)
