"""What starting a program costs: modules that it does not need stay out of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.spawn import ROOT

LIGHT = """
import json, sys
import pretrain.checkpoints, slurm.requeue_policy, slurm.runs, slurm.status, slurm.submit, unimo3.launch
print(json.dumps({"modules": len(sys.modules), "torch": "torch" in sys.modules}))
"""
RANK = """
import gc, json, sys
default = gc.get_threshold()
import torchvision_first
import pretrain.train
from unimo3.errors import exit_with_status
from unimo3.training.engine import import_muon_uncompiled
import_muon_uncompiled()
from deepspeed.runtime import compiler
import torch
facts = {name: name in sys.modules for name in ("networkx", "torch._inductor.compile_fx", "tensorboard")}
facts |= {"while importing": gc.get_threshold()[0], "compiles": compiler.compile() is torch.compile}

@exit_with_status
def main():
    facts.update(restored=gc.get_threshold() == default, frozen=gc.get_freeze_count())
    print(json.dumps(facts))

main()
"""


def run(program, **options):
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr  # as without freeing the frozen objects
    return json.loads(done.stdout)


@pytest.mark.integration
def test_what_only_reads_files_imports_no_torch():
    facts = run(LIGHT)
    assert not facts["torch"]
    assert facts["modules"] < 500


@pytest.mark.integration
def test_a_rank_imports_no_compiler_and_collects_no_garbage_meanwhile():
    # unimo3 before torchvision is all that makes it importable next to a CPU build of torch.
    facts = run(RANK.replace("torchvision_first", "unimo3, torchvision"))
    assert not any(facts[name] for name in ("networkx", "torch._inductor.compile_fx", "tensorboard"))
    assert facts["while importing"] > 100 * 700
    assert facts["restored"]
    assert facts["frozen"] > 100_000
    assert facts["compiles"]  # torch's compiler is still DeepSpeed's for whoever asks later


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "charset", "file"),
    [("en_US", "ISO-8859-1", "レシピ.yaml"), ("ja_JP", "EUC-JP", "recipe.yaml")],  # Python itself fails on such words
)
def test_files_and_names_are_utf8_whatever_the_locale(tmp_path, name, charset, file):
    if shutil.which("localedef") is None or not Path("/usr/share/i18n/charmaps").is_dir():
        pytest.skip("needs localedef and the locales' sources")
    subprocess.run(["localedef", "-f", charset, "-i", name, str(tmp_path / "odd")], check=True, capture_output=True)
    recipe = tmp_path / file
    recipe.write_text("run: {dir: 走行, name: é}\n", encoding="utf-8")
    command = [sys.executable, "-m", "slurm.runs", "pretrain.train", "--config", str(recipe)]
    environment = os.environ | {"LOCPATH": str(tmp_path), "LC_ALL": "odd", "PYTHONUTF8": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.stdout.decode() == "answer: 走行/é\n", done.stderr
