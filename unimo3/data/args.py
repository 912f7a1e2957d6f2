"""Settings of the data."""

from dataclasses import dataclass
from typing import Literal

from unimo3.data.loader import ReaderArgs
from unimo3.data.tokenizer import load_tokenizer
from unimo3.errors import ConfigError


@dataclass(frozen=True)
class DataArgs:
    """Shards, tokenizer, and how samples are read."""

    train: str = ""
    """Folder of training shards with their index.json."""
    val: str | None = None
    """Folder of held-out shards, for evaluation. Null: none."""
    tokenizer: str = ""
    """Tokenizer folder: RoBERTa's, or one that prepare_shards trained."""
    max_text_tokens: int = 50
    """Tokens a text is cut or padded to, <s> and </s> included."""
    augment: Literal["none", "randaugment"] = "none"
    """Augmentation of training images."""
    window_shards: int = 8
    """Shards whose samples are shuffled together."""
    num_workers: int = 4
    """Reader processes of each rank; 0 reads in the training process."""
    prefetch: int = 4
    """Micro-batches each reader prepares ahead."""
    max_bad_share: float = 0.001
    """Share of unreadable samples of all read so far past which the run ends with status 78; up to it they are replaced
    and counted. A single one is borne however few were read, unless this is 0."""
    ledger: bool = False
    """Whether to write the sample keys of each step and rank into the run's folder."""

    @property
    def reader(self) -> ReaderArgs:
        """How samples are read ahead."""
        return ReaderArgs(self.num_workers, self.prefetch)

    def faults(self) -> list[str]:
        """Say what is wrong with these settings, one line a fault; a program says what its shards must hold."""
        found = []
        try:
            load_tokenizer(self.tokenizer)
        except ConfigError as error:
            found += error.faults
        if self.max_text_tokens < 3:
            found.append(
                f"data.max_text_tokens: {self.max_text_tokens}: at least 3 are needed, for <s>, a word and </s>"
            )
        for name, least in (("window_shards", 1), ("num_workers", 0), ("prefetch", 1)):
            if getattr(self, name) < least:
                found.append(f"data.{name}: {getattr(self, name)}: at least {least} is needed")
        if not 0 <= self.max_bad_share < 1:
            found.append(f"data.max_bad_share: {self.max_bad_share}: at least 0 and below 1 is needed")
        return found
