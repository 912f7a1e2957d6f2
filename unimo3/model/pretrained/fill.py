"""Filling a module from tensors under other names.

Every tensor is either copied, on the caller's explicit list of unused ones, or named in an error. Every parameter that
nothing filled is named too. Tensors are read and copied one at a time, so no rank has a second copy of the model,
sharded by ZeRO-3 or not.

Source: transformers' from_pretrained reports the same three kinds of misfit: missing, unexpected, of another shape.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from unimo3.errors import CheckpointError, ConfigError
from unimo3.model.initialization import gathered

NO_WEIGHTS = (
    "no model.safetensors there, nor its index; convert older formats with transformers' "
    "from_pretrained(...).save_pretrained(...)"
)

_NUM_SHOWN = 5

NamedTensors = Iterable[tuple[str, Tensor]]


class Rename(NamedTuple):
    """Source names that match `pattern` go to `replacement`, as the `part`-th of `num_parts` equal blocks of its rows.

    Blocks are for projections that are one parameter here and several elsewhere.
    """

    pattern: str
    replacement: str | Callable[[re.Match[str]], str]
    part: int = 0
    num_parts: int = 1


def fill(
    module: nn.Module,
    tensors: NamedTensors,
    source: str,
    renames: Sequence[Rename] = (),
    unused: str = r"^$",
    fresh: str = r"^$",
    adapt: Callable[[str, Tensor, torch.Size], Tensor] = lambda name, tensor, shape: tensor,
) -> None:
    """Fill `module`.

    Args:
        tensors: those on the meta device are only compared.
        source: of the tensors, for errors.
        renames: the first that matches a name is applied; a name that none matches stays.
        unused: pattern of source names that the module does not use.
        fresh: pattern of the module's parameters that may be missing there and keep their values.
        adapt: (parameter's name, tensor, shape of the parameter) -> tensor, for those that may be stored otherwise.

    Raises:
        CheckpointError: any other tensor is missing, unexpected or of another shape.
    """
    # A tied parameter has several names; the first stands for it.
    first_names = {parameter: name for name, parameter in module.named_parameters()}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    missing = {name for name in first_names.values() if not re.search(fresh, name)}
    pieces: dict[str, set[int]] = {}
    unexpected, misfits, repeated = [], [], []
    for source_name, tensor in tensors:
        if re.search(unused, source_name):
            continue
        name, part, num_parts = _target(source_name, renames)
        parameter = parameters.get(name)
        if parameter is None:
            unexpected.append(source_name)
            continue
        if part in pieces.setdefault(name, set()):
            repeated.append(source_name)
            continue
        with gathered([parameter]), torch.no_grad():
            tensor = adapt(name, tensor, parameter.shape)
            block = parameter.chunk(num_parts)[part]
            if block.shape == tensor.shape:
                if not tensor.is_meta:
                    block.copy_(tensor)
            else:
                misfits.append(f"{source_name} {tuple(tensor.shape)} (here {tuple(block.shape)})")
        pieces[name].add(part)
        if len(pieces[name]) == num_parts:
            missing.discard(first_names[parameter])
    errors = [
        f"{kind}: {_shown(sorted(names))}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misfits),
            ("there twice", repeated),
        )
        if names
    ]
    if errors:
        raise CheckpointError(
            f"{source}: its tensors do not fit {type(module).__name__}; {'; '.join(errors)}. "
            "Use weights of the same architecture and sizes"
        )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more


def read_config(field: str, folder: str, kind: str, has_weights: bool = True) -> PreTrainedConfig:
    """Read the configuration of a local Hugging Face folder, and check that its weights can be opened.

    Args:
        field: setting that named the folder, for errors.
        kind: of model that the folder should contain, the same.
        has_weights: whether the folder also has weights.

    Raises:
        ConfigError: there is no such folder, or its configuration or its weights cannot be read.
    """
    where = f"{field}: '{folder}'"
    if not folder or not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{where}: no config.json there; name a local Hugging Face {kind} folder")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ConfigError as error:  # of another version
        raise ConfigError([f"{where}: {line}" for line in error.errors]) from error
    except Exception as error:  # transformers raises of many kinds for a file it cannot use
        raise ConfigError(
            f"{where}: its config.json is none of transformers' ({first_line(error)}); name a local Hugging "
            f"Face {kind} folder"
        ) from error
    if has_weights:
        try:
            read_names(Path(folder))
        except CheckpointError as error:
            raise ConfigError(f"{where}: {error}") from error
    return config


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's weights, one at a time.

    Raises:
        CheckpointError: there are none, or not all of them.
    """
    for file in weight_files(folder):
        yield from read_file(file)


def read_names(folder: Path) -> list[str]:
    """Names of every tensor of a folder's weights; raises as `read_tensors`."""
    names: list[str] = []
    for file in weight_files(folder):
        with open_file(file) as tensors:
            names += tensors.keys()
    return names


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of a folder's tensors, or of one safetensors file's, by the files' headers; see `read_tensors`."""
    shapes: dict[str, list[int]] = {}
    for file in [path] if path.is_file() else weight_files(path):
        with open_file(file) as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return shapes


def without_values(shapes: dict[str, list[int]]) -> NamedTensors:
    """Tensors for `fill` to compare only."""
    return ((name, torch.empty(shape, device="meta")) for name, shape in shapes.items())


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, chosen as transformers does: the single one, else those that the index names.

    Raises:
        CheckpointError: there is none, or one that the index names is not there.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise CheckpointError(f"{folder}: {NO_WEIGHTS}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        is_valid = bool(names) and all(isinstance(name, str) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise CheckpointError(f"{folder}: {index.name} is no index that names files of weights; copy it again")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: {absent[0]}, which {index.name} names, is not there; copy it too")
    return [folder / name for name in names]


def open_file(file: Path) -> Any:
    """Open a safetensors file.

    Raises:
        CheckpointError: it is not one, or is truncated.
    """
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file.name} is no complete safetensors file ({error}); copy it again") from error


def read_file(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of one safetensors file, one at a time."""
    with open_file(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
            yield name, tensors.get_tensor(name)


def _target(name: str, renames: Sequence[Rename]) -> tuple[str, int, int]:
    for rename in renames:
        new, count = re.subn(rename.pattern, rename.replacement, name)
        if count:
            return new, rename.part, rename.num_parts
    return name, 0, 1
