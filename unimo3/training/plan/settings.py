"""Settings of a planned run: the files that they name need not exist, and the hardware may be elsewhere.

Source: none.
"""

from dataclasses import dataclass
from pathlib import Path

from unimo3.data.args import DataArgs
from unimo3.data.tokenizer import load_tokenizer
from unimo3.model.args import length_errors, tokenizer_errors
from unimo3.model.config import Unimo3Config
from unimo3.training.args import TrainingArgs


@dataclass(frozen=True)
class PlannedData(DataArgs):
    """Data that need not exist yet."""

    def validate(self) -> list[str]:
        """As when training, except for a missing tokenizer."""
        errors = super().validate()
        return errors if self.has_tokenizer else [line for line in errors if not line.startswith("data.tokenizer:")]

    @property
    def has_tokenizer(self) -> bool:
        """Whether the tokenizer's folder exists."""
        return bool(self.tokenizer) and Path(self.tokenizer).is_dir()

    def model_errors(self, model: Unimo3Config) -> list[str]:
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

    def validate(self) -> list[str]:
        """As when training, except for what this machine lacks; a micro-batch is required."""
        errors = [line for line in super().validate() if "fp16 needs a GPU" not in line]
        if self.micro_batch < 1:
            errors.append(f"training.micro_batch: {self.micro_batch}: at least 1 pair is needed")
        return errors
