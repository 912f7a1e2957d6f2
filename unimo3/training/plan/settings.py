"""Settings of a planned run, whose files need not exist, and of the machine, which may be elsewhere.

Source: none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unimo3.data.args import DataArgs
from unimo3.data.tokenizer import load_tokenizer
from unimo3.model.tokenizer_checks import length_errors, tokenizer_errors
from unimo3.training.args import TrainingArgs

if TYPE_CHECKING:
    from unimo3.model.config import Unimo3Config


@dataclass(frozen=True)
class Fabric:
    """What connects the GPUs; the defaults are the link rates of a node of eight H100.

    Source: NVIDIA's H100 datasheet, NVLink 4 with 900 GB/s, half in each direction; DGX H100's, one network card of
    400 Gb/s a GPU.

    Attributes:
        gpus_per_node: ranks of a node.
        node_bytes_s: a GPU receives from those of its node.
        network_bytes_s: a node receives from others, divided by its GPUs.
        overlap: fraction of the exchange that computation hides.
    """

    gpus_per_node: int = 8
    node_bytes_s: float = 450e9
    network_bytes_s: float = 50e9
    overlap: float = 0.0


@dataclass(frozen=True)
class Machine:
    """The GPUs to be used.

    Attributes:
        num_gpus: of all nodes, one rank each.
        memory_bytes: of one GPU.
        reserve: fraction of it left to the CUDA context, NCCL and fragmentation.
        peak_flops: of one GPU and second, by the precision of a step (bf16, fp16, fp32).
        utilization: fraction of the peak that a step reaches.
        fabric: between them.
    """

    num_gpus: int
    memory_bytes: int
    reserve: float
    peak_flops: dict[str, float]
    utilization: float
    fabric: Fabric = Fabric()

    @property
    def usable_bytes(self) -> float:
        """Memory of one GPU, less the reserve."""
        return self.memory_bytes * (1 - self.reserve)

    def compute_s(self, global_batch: int, flops: float, precision: str) -> float:
        """Seconds that an optimizer step computes at `flops` a pair."""
        return global_batch * flops / (self.num_gpus * self.peak_flops[precision] * self.utilization)


@dataclass(frozen=True)
class PlannedData(DataArgs):
    """Data that need not exist yet."""

    def quick_errors(self) -> list[str]:
        """As when training, except for a missing tokenizer."""
        errors = super().quick_errors()
        return errors if self.has_tokenizer else [line for line in errors if not line.startswith("data.tokenizer:")]

    def slow_errors(self) -> list[str]:
        """As when training, if there is a tokenizer."""
        return super().slow_errors() if self.has_tokenizer else []

    @property
    def has_tokenizer(self) -> bool:
        """Whether the tokenizer's folder exists."""
        return bool(self.tokenizer) and Path(self.tokenizer).is_dir()

    def model_errors(self, model: "Unimo3Config") -> list[str]:
        """Return where the length of texts and the tokenizer, if it exists, do not fit a model, one line per error."""
        if self.validate():
            return []  # the check of these settings reports it
        if not self.has_tokenizer:
            return length_errors(model.text_config, self.max_text_tokens, model.text_config.pad_token_id or 0)
        tokenizer = load_tokenizer(self.tokenizer)
        return tokenizer_errors(model.text_config, tokenizer, self.max_text_tokens, is_trained=False)


@dataclass(frozen=True)
class PlannedTraining(TrainingArgs):
    """Training on another machine."""

    def slow_errors(self) -> list[str]:
        """As when training, except for what this machine lacks."""
        return [line for line in super().slow_errors() if "fp16 needs a GPU" not in line]

    def quick_errors(self) -> list[str]:
        """As when training; a micro-batch is required."""
        errors = super().quick_errors()
        if self.micro_batch < 1:
            errors.append(f"training.micro_batch: {self.micro_batch}: at least 1 pair is needed")
        return errors
