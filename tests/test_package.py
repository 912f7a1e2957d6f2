"""The wheel: what a machine without the repository gets."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.spawn import ROOT
from unimo3 import __version__

SOURCES = ("unimo3", "pretrain", "finetune", "slurm", "ds_configs", "pyproject.toml", "README.md", "LICENSE")
TASKS = ("nlvr2", "retrieval", "snli_ve", "vqa")
# Calls the console scripts' functions one after the other, since each process would import torch again.
PROGRAM = """
import contextlib, io, json, sys
from importlib.metadata import distribution
from unimo3.project_files import package_folder, project_file

functions = {script.name: script.load() for script in distribution("unimo3").entry_points}

def output_of(name, *words):
    sys.argv = [f"/somewhere/bin/{name}", *words]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            functions[name]()
        except SystemExit as end:
            assert end.code in (0, None), (name, words, end.code)
    return output.getvalue()

tasks = sys.argv[1:]
recipes = {f"unimo3-finetune {task}": f"finetune/recipes/{task}_tiny.yaml" for task in tasks}
programs = {name: name.split() for name in [*functions, *recipes]}
recipes["unimo3-pretrain"] = "pretrain/recipes/tiny.yaml"
json.dump({
    "help": {name: output_of(*words, "--help") for name, words in programs.items()},
    "configs": {name: output_of(*programs[name], "--config", path, "--print_config") for name, path in recipes.items()},
    "submit": output_of("unimo3-submit", "--dry-run", "prepare_shards", "coco", "--src", "../empty", "--out", "o"),
    "ds_config": str(project_file("ds_configs/zero3_fp32.json")),
    "data": [str(package_folder(name)) for name in ("unimo3.kernels.cross_layer_attention", "unimo3", "slurm")],
}, sys.stdout)
"""


def checked(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.integration
def test_the_wheel_has_all_programs_and_files_in_an_empty_folder(tmp_path):
    source, installed, empty = tmp_path / "source", tmp_path / "installed", tmp_path / "empty"
    for folder in (source, empty):
        folder.mkdir()
    for name in SOURCES:  # setuptools writes next to them
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    offline = ("--no-index", "--no-deps")
    checked(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("unimo3-*.whl")
    assert wheel.name == f"unimo3-{__version__}-py3-none-any.whl"
    checked(*pip, "install", *offline, "--target", installed, wheel)

    environment = os.environ | {"PYTHONPATH": str(installed), "PATH": str(installed / "bin")}
    printed = json.loads(checked(sys.executable, "-c", PROGRAM, *TASKS, cwd=empty, env=environment))
    assert len(printed["help"]) == 11 + len(TASKS)
    for name, text in printed["help"].items():
        assert text.startswith(f"usage: {name} ["), text
    for text in printed["configs"].values():
        assert yaml.safe_load(text)["training"]["ds_config"] == "ds_configs/zero3_fp32.json"
    script = installed / "slurm" / "prepare_shards.sbatch"
    assert script.read_text() in printed["submit"]
    assert printed["submit"].splitlines()[-1].endswith(f" {script} coco --src ../empty --out o")
    assert Path(printed["ds_config"]) == installed / "ds_configs" / "zero3_fp32.json"
    kernel, library, scripts = map(Path, printed["data"])
    for path in (kernel / "native.cpp", library / "py.typed", scripts / "common.sh", scripts / "site.env.example"):
        assert path.is_file()
    (record,) = installed.glob("unimo3-*.dist-info")
    assert (record / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "\nLicense-Expression: Apache-2.0\n" in (record / "METADATA").read_text()
    assert not any((installed / name).exists() for name in ("tests", "benchmarks", "experiments"))
    # Each script by itself starts its program.
    assert checked(installed / "bin" / "unimo3-status", "--version", cwd=empty, env=environment) == (
        f"unimo3 {__version__}\n"
    )
    assert not list(empty.iterdir())
