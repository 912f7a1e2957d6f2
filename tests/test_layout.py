"""The direction of dependencies, and what may stand in the repository."""

import ast
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from unimo3 import __version__

ROOT = Path(__file__).parents[1]

# A layer may import itself, the layers after it in this order, and the modules at the top of unimo3/.
ORDER = (
    "unimo3.training",
    "unimo3.inference",
    "unimo3.objectives",
    "unimo3.checkpoint",
    "unimo3.data",
    "unimo3.model",
    "unimo3.kernels",
    "unimo3.metrics",
)
SIBLINGS = {"unimo3.objectives", "unimo3.checkpoint", "unimo3.data"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def layer_of(module):
    return next((layer for layer in ORDER if module == layer or module.startswith(f"{layer}.")), None)


@pytest.mark.parametrize("layer", ORDER)
def test_the_library_depends_downwards_only(layer):
    allowed = set(ORDER[ORDER.index(layer) :]) - (SIBLINGS - {layer} if layer in SIBLINGS else set())
    if layer == "unimo3.data":
        allowed -= {"unimo3.model", "unimo3.kernels"}
    for path in (ROOT / layer.replace(".", "/")).rglob("*.py"):
        for module in imports(path):
            assert not module.startswith(("pretrain", "finetune")), f"{path} imports {module}"
            imported = layer_of(module)
            assert imported is None or imported in allowed, f"{path} imports {module}"


def test_pretrain_and_finetune_do_not_import_each_other():
    for one, other in (("pretrain", "finetune"), ("finetune", "pretrain")):
        for path in (ROOT / one).rglob("*.py"):
            assert not [m for m in imports(path) if m.split(".")[0] == other], path


def test_one_module_reads_ds_configs():
    readers = [path for path in (ROOT / "unimo3").rglob("*.py") if "ds_configs" in path.read_text()]
    # args.py: the default of a setting; project_files.py: where they are
    assert {path.name for path in readers} == {"ds_config.py", "args.py", "project_files.py"}


def test_the_version_stands_once():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert newest.startswith(f"## [{__version__}] - ")


def test_ci_runs_what_the_workflow_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text())
    assert ".ci/run" in [step.get("run") for step in workflow["jobs"]["check"]["steps"]]


def test_requirements_pin_a_version_of_each_dependency():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {pin.name: pin for pin in map(Requirement, lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert list(pins) == [Requirement(line).name for line in named]
    assert {"torch", "deepspeed", "transformers", "timm", "webdataset", "tensorboard", "mpi4py"} <= set(pins)
    assert "apex" not in pins  # PyPI's is another project
    for dependency in map(Requirement, named):
        pin = pins.pop(dependency.name)
        assert pin.extras == dependency.extras, dependency
        if dependency.name == "triton":  # torch's own pin decides
            assert pin.specifier == dependency.specifier
        else:
            (version,) = pin.specifier
            assert version.operator == "==", pin
            assert version.version in dependency.specifier, dependency
