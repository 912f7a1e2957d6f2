"""An exported folder as a model that is ready to predict: checked, on its device, in a type the device computes in.

Weights come from safetensors, and no code that a folder brings along is run.

Source: transformers' from_pretrained.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from unimo3.checkpoint.export import changed_files
from unimo3.data.transforms import image_processor
from unimo3.dtypes import dtype_of
from unimo3.errors import CheckpointError, ConfigError, Unimo3Error
from unimo3.model.config import Unimo3Config
from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
from unimo3.model.pretrained.fill import first_line, read_config
from unimo3.model.processor import Unimo3Processor
from unimo3.model.tokenizer_checks import largest_id, max_text_tokens
from unimo3.model.unimo3 import Unimo3ForPreTraining, Unimo3PreTrainedModel

log = logging.getLogger(__name__)

DtypeName = Literal["auto", "fp32", "bf16", "fp16"]
# The settings of an image processor that decide pixels.
_PREPARATION = (
    "do_resize",
    "resample",
    "do_center_crop",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
# A text has at least <s>, a word and </s>.
_LEAST_TOKENS = 3


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with what prepares its inputs.

    Attributes:
        folder: from which the model was loaded.
        device: of the model.
    """

    folder: Path
    model: Any
    config: Unimo3Config
    processor: Any
    device: torch.device


def load(
    folder: str, model_class: type[Unimo3PreTrainedModel], device: str = "auto", dtype: DtypeName = "auto"
) -> Loaded:
    """Open a folder that ``python -m pretrain.export`` wrote, or ``save_pretrained`` with a processor's next to it.

    Args:
        model_class: whose weights are needed. Retrieval's are pretraining's too.
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto``: a GPU where there is one.
        dtype: to compute in. ``auto``: the weights' own; fp32 for fp16 weights on a CPU, with a warning in the log.

    Raises:
        ConfigError: the folder lacks a part, is of another task, or device or type cannot be had; all errors at once.
        CheckpointError: its weights do not fit its configuration.
    """
    if (Path(folder) / "checkpoints").is_dir():
        raise ConfigError(
            f"--weights '{folder}': is a run; name what python -m pretrain.export {folder} --out DIR wrote"
        )
    config = read_config("--weights", folder, "UNIMO-3")
    if not isinstance(config, Unimo3Config):
        raise ConfigError(
            f"--weights '{folder}': contains a '{config.model_type}' model; an exported UNIMO-3 is needed"
        )
    errors = _class_errors(folder, config, model_class)
    processor = None
    try:
        processor = _processor(folder, config)
    except ConfigError as error:
        errors += error.errors
    target = computed = None
    try:
        target = device_of(device)
        computed = _dtype_of(dtype, config, target)
    except ConfigError as error:
        errors += error.errors
    errors += [f"--weights {problem}" for problem in changed_files(folder)]
    if errors:
        raise ConfigError(errors)
    assert target is not None
    assert computed is not None
    model = _model(folder, model_class, config, computed, target)
    return Loaded(Path(folder), model, config, processor, target)


def device_of(name: str) -> torch.device:
    """The device of that name; ``auto``: a GPU where there is one.

    Raises:
        ConfigError: this machine has none of that name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs; use auto or cpu")
    return device


def _dtype_of(name: DtypeName, config: Unimo3Config, device: torch.device) -> torch.dtype:
    stored = getattr(torch, str(config.dtype).removeprefix("torch."), torch.float32) if config.dtype else torch.float32
    chosen: torch.dtype = stored if name == "auto" else dtype_of(name)
    if device.type != "cpu" or chosen is not torch.float16:
        return chosen
    if name == "fp16":
        raise ConfigError("--dtype fp16: not supported on a CPU; use fp32, or bf16 for half the memory")
    log.warning("the weights are fp16, which a CPU does not compute in: using fp32; --dtype bf16 takes half the memory")
    return torch.float32


def _class_errors(folder: str, config: Unimo3Config, model_class: type[Unimo3PreTrainedModel]) -> list[str]:
    known = config.architectures or [model_class.__name__]
    if not isinstance(known, list):
        return [f"--weights '{folder}': its config.json has the architectures {known!r}; export the run again"]
    if model_class.__name__ in known:
        return []
    if model_class is Unimo3ForImageAndTextRetrieval and Unimo3ForPreTraining.__name__ in known:
        return []
    return [
        f"--weights '{folder}': contains weights of {known[0]}, {model_class.__name__} is needed; "
        "name an export of a run "
        "that was tuned for this task"
    ]


def _processor(folder: str, config: Unimo3Config) -> Any:
    try:
        processor = Unimo3Processor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        _check_processor(folder, config, processor)
    except ConfigError:
        raise
    except Exception as error:  # transformers raises of many kinds for a file it cannot use
        raise ConfigError(
            f"--weights '{folder}': contains no tokenizer and image processor that transformers can read "
            f"({type(error).__name__}: {first_line(error)}); name what python -m pretrain.export wrote"
        ) from error
    return processor


def _check_processor(folder: str, config: Unimo3Config, processor: Any) -> None:
    """Refuse a processor that prepares inputs in another way than training did; limit its texts to the positions."""
    size = config.vision_config.image_size
    prepared = getattr(processor.image_processor, "size", None) or {}
    sides = (prepared.get("height"), prepared.get("width"))
    if sides != (size, size):
        raise ConfigError(
            f"--weights '{folder}': its image processor makes {_pixels(sides)} pixels, its config.json has the model "
            f"read {size} x {size}; export the run again"
        )
    theirs, ours = processor.image_processor.to_dict(), image_processor(size).to_dict()
    for name in _PREPARATION:
        if theirs.get(name) != ours.get(name):
            raise ConfigError(
                f"--weights '{folder}': its image processor has {name} {theirs.get(name)}, training had "
                f"{ours.get(name)}; export the run again"
            )
    text, tokenizer = config.text_config, processor.tokenizer
    if largest_id(tokenizer) >= text.vocab_size:
        raise ConfigError(
            f"--weights '{folder}': its tokenizer has {len(tokenizer)} entries, the largest id is "
            f"{largest_id(tokenizer)}, its model {text.vocab_size} entries; export the run again"
        )
    padding_id = text.pad_token_id
    if padding_id is None or tokenizer.pad_token_id != padding_id:
        raise ConfigError(
            f"--weights '{folder}': its tokenizer pads with the id {tokenizer.pad_token_id}, its model with "
            f"{padding_id}; export the run again"
        )
    longest = min(tokenizer.model_max_length, max_text_tokens(text, padding_id))
    if not isinstance(longest, int) or longest < _LEAST_TOKENS:
        raise ConfigError(
            f"--weights '{folder}': its tokenizer has model_max_length {tokenizer.model_max_length}, its model "
            f"positions for {max_text_tokens(text, padding_id)} tokens; at least {_LEAST_TOKENS} are needed; export "
            "the run again"
        )
    tokenizer.model_max_length = longest


def _pixels(size: tuple[Any, Any]) -> str:
    return "no stated number of" if None in size else " x ".join(map(str, size))


def _model(
    folder: str,
    model_class: type[Unimo3PreTrainedModel],
    config: Unimo3Config,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """The model in evaluation mode, after it has fused a blank image with a short text."""
    size = config.vision_config.image_size
    try:
        model = _read_model(folder, model_class, config, dtype).to(device).eval()
        text = torch.zeros((1, _LEAST_TOKENS), dtype=torch.long, device=device)
        with torch.inference_mode():
            states = model.unimo3(text, torch.zeros((1, 3, size, size), dtype=dtype, device=device)).pooler_output
        if not states.isfinite().all():
            raise ValueError("it computes no finite numbers")
    except (Unimo3Error, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a changed config.json, of any kind
        raise CheckpointError(
            f"--weights '{folder}': its config.json and its weights make no {model_class.__name__} "
            f"({type(error).__name__}: {first_line(error)}); export the run again"
        ) from error
    return model


def _read_model(folder: str, model_class: type[Unimo3PreTrainedModel], config: Unimo3Config, dtype: torch.dtype) -> Any:
    loaded: Any = model_class.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = loaded
    errors = [
        f"{kind}: {', '.join(sorted(str(name) for name in names))}"
        for kind, names in (
            ("missing", report["missing_keys"]),
            ("unexpected", report["unexpected_keys"]),
            ("of another shape", [entry[0] for entry in report["mismatched_keys"]]),
        )
        if names
    ]
    if errors:
        raise CheckpointError(
            f"--weights '{folder}': its tensors do not fit {model_class.__name__}; {'; '.join(errors)}. Export the run "
            "again"
        )
    return model
