"""Which programs there are to fine-tune: the modules of finetune/ that have settings and a ``main``.

Their text is read, not imported: a job script asks before anything else, and torch takes seconds to come.

Source: none.
"""

import ast
from pathlib import Path

_PACKAGE = "finetune"
_FOLDER = Path(__file__).parents[1] / _PACKAGE


def tasks() -> list[str]:
    """Names of the tasks; the folder's other modules are what the tasks share."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if _trains(path))


def missing_program(module: str) -> list[str]:
    """An error if a task of fine-tuning is none.

    Args:
        module: a program, such as ``finetune.vqa``; without a task ``finetune.``.
    """
    package, _, task = module.partition(".")
    if package != _PACKAGE or task in tasks():
        return []
    return [f"'{module}': there is no such program; finetune takes a task first: {', '.join(tasks())}"]


def _trains(path: Path) -> bool:
    parts = ast.parse(path.read_text()).body
    has_main = any(isinstance(part, ast.FunctionDef) and part.name == "main" for part in parts)
    return has_main and any(isinstance(part, ast.ClassDef) and part.name.endswith("Config") for part in parts)
