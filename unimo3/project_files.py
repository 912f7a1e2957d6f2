"""Files that come with the project, in a checkout or installed: recipes, DeepSpeed configurations, job scripts.

Source: Python's importlib.resources.
"""

from importlib.resources import files
from pathlib import Path

_NAMED_BY_SETTINGS = ("pretrain", "finetune", "ds_configs")


def package_folder(package: str) -> Path:
    """The folder of a package and its data."""
    return Path(str(files(package)))


def project_file(name: str | Path, start: Path = Path()) -> Path:
    """The file that a setting names: that in the folder `start` or, if there is none, that of the project.

    So ``pretrain/recipes/base.yaml`` and ``ds_configs/zero3_bf16.json`` can be named in any folder.
    """
    path, package = start / name, Path(name).parts[:1]
    if path.exists() or not package or package[0] not in _NAMED_BY_SETTINGS:
        return path
    ours = package_folder(package[0]).parent / name
    return ours if ours.is_file() else path
