"""The state of a run in addition to DeepSpeed's tensors: ``state.json`` and one RNG file a rank."""

import base64
import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unimo3.engine import Engine
from unimo3.errors import CheckpointError

# torch, NumPy and safetensors are imported where generators are read: listing checkpoints needs none of them.


@dataclass(frozen=True)
class TrainState:
    """The progress of a run.

    Attributes:
        step: optimizer steps done.
        samples_consumed: samples that its steps have read.
        config_hash: of the run's settings.
        index_fingerprint: of the training data.
        world_size: ranks that wrote the checkpoint.
        global_batch: pairs an optimizer step.
        engine: ZeRO stage and precision, such as ``ZeRO-3 bf16``; set when the checkpoint is saved.
        extra: other values that a program saves; plain JSON.
    """

    step: int
    samples_consumed: int
    config_hash: str
    index_fingerprint: str
    world_size: int
    global_batch: int
    extra: dict[str, Any] = field(default_factory=dict)
    engine: str = ""

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "TrainState":
        """Read what `write` wrote.

        Raises:
            CheckpointError: the file is missing or of another form.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: is not a run's state ({error}); use an earlier checkpoint") from error


def describe_engine(engine: Engine) -> str:
    """What decides the form of an engine's files, such as ``ZeRO-3 bf16``."""
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    return f"ZeRO-{engine.zero_optimization_stage()} {precision}"


Generators = tuple[dict[str, Any], dict[str, str]]
"""States of the generators as `save_rng` writes them: tensors and metadata."""


def capture_rng() -> Generators:
    """The states of Python's, NumPy's, torch's and this GPU's generators."""
    import numpy as np
    import torch

    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  (libraries draw from it)
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    described = {
        "python": [version, list(words), gauss],
        "numpy": [name, base64.b64encode(np.asarray(keys).tobytes()).decode(), position, has_gauss, cached],
    }
    return tensors, {"generators": json.dumps(described)}


def save_rng(path: Path, generators: Generators) -> None:
    """Write generators' states, without pickle."""
    from safetensors.torch import save_file

    tensors, metadata = generators
    save_file(tensors, path, metadata=metadata)


def load_rng(path: Path, new_rank: int | None = None) -> None:
    """Restore what `save_rng` wrote.

    Args:
        new_rank: a rank without saved generators: its generators are seeded with the loaded ones and its number.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    import numpy as np
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        described: dict[str, Any] = json.loads(header["__metadata__"]["generators"])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: contains no generator states ({error}); use an earlier checkpoint") from error
    version, words, gauss = described["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = described["numpy"]
    words_array = np.frombuffer(base64.b64decode(keys), dtype=np.uint32)
    np.random.set_state((name, words_array, position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    if new_rank is not None:
        seeds = np.random.SeedSequence([*words_array.tolist()[:8], random.getrandbits(32), new_rank]).generate_state(3)
        random.seed(int(seeds[0]))
        np.random.seed(int(seeds[1]))  # noqa: NPY002
        torch.manual_seed(int(seeds[2]))  # the GPUs' too
