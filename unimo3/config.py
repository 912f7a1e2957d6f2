"""Settings from a YAML file and the command line into a checked dataclass, with every error in one message.

A program's settings are one dataclass of groups; each group stands next to the code it configures, with a docstring
under each field that ``--help`` prints. A dataclass may have ``validate() -> list[str]``; each error names the field,
the value and the fix. Modules of settings import torch and its libraries where they are used: ``--help`` and most
errors come without them, see `Checked`.

Source: jsonargparse, https://jsonargparse.readthedocs.io; collected errors after litgpt's ``validate_args``.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings

from unimo3 import __version__
from unimo3.atomic_write import replace_text
from unimo3.errors import ConfigError
from unimo3.project_files import project_file
from unimo3.startup import started_as
from unimo3.versions import check_version

Config = TypeVar("Config")
Flat = dict[str, Any]

# Settings whose names have changed: recipes, run folders and command lines from before may have the old ones.
RENAMED = {
    "optim.warmup_share": "optim.warmup_ratio",
    "data.max_bad_share": "data.max_bad_ratio",
}

_VERSION = 1

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclasses.dataclass(frozen=True)
class Checked:
    """Settings some of whose checks import torch, transformers, timm or deepspeed, which takes seconds."""

    def quick_errors(self) -> list[str]:
        """Return the errors that are found without these libraries, one line each."""
        return []

    def slow_errors(self) -> list[str]:
        """Return the other errors, one line each; called where there are no quick ones."""
        return []

    def validate(self) -> list[str]:
        """Return the errors of these settings, one line each."""
        return self.quick_errors() or self.slow_errors()

    def checked_group(self, name: str) -> Any:
        """A group of settings as it is to be checked, where that depends on other groups."""
        return getattr(self, name)


def parse(config_class: type[Config], argv: list[str] | None, program: str, description: str) -> Config:
    """Build `config_class` from ``--config FILE`` and ``--group.key value`` arguments; later ones win.

    Args:
        config_class: a dataclass whose fields are groups (dataclasses) or plain values, all with defaults.
        argv: the arguments; ``sys.argv[1:]`` when None.
        program: how users start it, for the help text: ``python -m MODULE``.

    Raises:
        ConfigError: with one line for every unknown key, value of a wrong type and error of the settings; or, if
            there are none of these, for every one of `Checked.slow_errors`.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(config_class, program, description)
    if about := [word for word in argv if word in ("-h", "--help", "--version")]:
        parser.parse_args(about[:1])
    printing = [word for word in argv if word.startswith("--print_config")]
    known = set(flatten_fields(config_class))
    overrides = _read_overrides([word for word in argv if word not in printing], known)
    errors = []
    texts: dict[str, str] = {}
    for key, value in overrides.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists all keys"
            errors.append(f"{key}: {value!r}: no such setting; {hint}")
            continue
        texts[key] = value if isinstance(value, str) else json.dumps(value, default=str)
    good: Flat = {}
    try:
        # All at once: a parse takes a tenth of a second for any number of values.
        parsed = parser.parse_args([f"--{key}={text}" for key, text in texts.items()])
        good = {key: parsed[key] for key in texts}
    except ArgumentError:
        # One by one, for the error of each.
        for key, text in texts.items():
            try:
                good[key] = parser.parse_args([f"--{key}={text}"])[key]
            except ArgumentError as error:
                errors.append(f"{key}: {overrides[key]!r}: {_type_hint(error)}")
    if printing and not errors:
        parser.parse_args([*(f"--{key}={text}" for key, text in texts.items()), *printing])
    config = parser.instantiate_classes(parser.parse_object(_nest(good)))
    built: Config = config_class(**{field.name: config[field.name] for field in dataclasses.fields(config_class)})  # type: ignore[arg-type]
    if errors := errors + _errors(built, "quick_errors") if errors else collect_errors(built):
        raise ConfigError(errors)
    return built


def collect_errors(config: Any) -> list[str]:
    """All errors of a dataclass: its groups' first, then its own; slow ones only if there are no quick ones."""
    return _errors(config, "quick_errors") or _errors(config, "slow_errors")


def _errors(config: Any, check: str) -> list[str]:
    errors = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            errors += _errors(config.checked_group(field.name) if isinstance(config, Checked) else value, check)
    if isinstance(config, Checked):
        errors += getattr(config, check)()
    elif check == "quick_errors" and hasattr(config, "validate"):
        errors += config.validate()
    return errors


def flatten(config: Any, prefix: str = "") -> Flat:
    """A dataclass as ``{"group.key": value}``."""
    flat: Flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def flatten_fields(config_class: type, prefix: str = "") -> list[str]:
    """The dotted names of a dataclass's settings."""
    return list(flatten(config_class(), prefix))


def renamed(flat: Flat) -> Flat:
    """Settings under the names that they have now."""
    return {RENAMED.get(key, key): value for key, value in flat.items()}


def save(config: Any, path: Path) -> None:
    """Write a dataclass as YAML that ``--config`` reads back; the file is written atomically."""
    replace_text(path, yaml.safe_dump({"version": _VERSION} | dataclasses.asdict(config), sort_keys=False))


def read_flat(path: Path, config_class: type | None = None, option: str = "--config") -> Flat:
    """A file of settings, as ``{"group.key": value}``.

    Args:
        config_class: whose settings; None: any, and settings that are mappings are flattened too.
        option: that names the file, for the message if it cannot be used.

    Raises:
        ConfigError: it cannot be read, or contains no settings.
    """
    return _read_file(path, set(flatten_fields(config_class)) if config_class else set(), option)


def fingerprint(flat: Flat) -> str:
    """SHA-256 of settings and their values."""
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def _parser(config_class: type, program: str, description: str) -> ArgumentParser:
    version = f"unimo3 {__version__}"
    parser = ArgumentParser(prog=started_as(program), description=description, version=version, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of settings; later arguments win.")
    parser.add_class_arguments(config_class)
    return parser


def _read_overrides(argv: list[str], known: set[str]) -> Flat:
    """The keys and values that files and arguments set, in order of precedence."""
    overrides: Flat = {}
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            raise ConfigError(f"argument '{arg}': settings are given as --group.key value")
        key, equals, value = arg[2:].partition("=")
        if key.startswith("local_rank"):
            # The deepspeed launcher adds it; the environment has the same value.
            continue
        if not equals:
            if not rest and (key == "config" or key.replace("-", "_") in known):
                raise ConfigError(f"--{key}: a value is needed after it")
            if not rest:
                rest = [""]  # `known` has no such setting, which is reported
            value = rest.pop(0)
        if key == "config":
            overrides |= _read_file(Path(value), known)
        else:
            overrides |= renamed({key.replace("-", "_"): value})
    return overrides


def _read_file(path: Path, known: set[str], option: str = "--config") -> Flat:
    try:
        content = yaml.safe_load(project_file(path).read_text())
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be read ({error.strerror}); name a recipe file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{option} {path}: is not YAML ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{option} {path}: must contain groups of settings, as the recipes do")
    check_version(f"{option} {path}", content, (_VERSION,))
    content.pop("version", None)
    return renamed(_flatten_dict(content, known))


def _flatten_dict(content: dict, known: set[str], prefix: str = "") -> Flat:
    flat: Flat = {}
    for key, value in content.items():
        # The value of a setting may be a mapping itself.
        if isinstance(value, dict) and f"{prefix}{key}" not in known:
            flat |= _flatten_dict(value, known, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _nest(flat: Flat) -> dict:
    nested: dict = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        target = nested
        for group in groups:
            target = target.setdefault(group, {})
        target[name] = value
    return nested


def _type_hint(error: Exception) -> str:
    """The reason in jsonargparse's message, without its preamble and Python's names of types."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "xpected" in line or "alid" in line), lines[-1])
    return re.sub(r"<class '(\w+)'>", r"\1", reason).replace("typing.Literal", "one of ")
