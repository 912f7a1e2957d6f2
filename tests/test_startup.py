"""What starting a program costs: modules that it does not need stay out of it."""

import json
import subprocess
import sys

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
found = {name: name in sys.modules for name in ("networkx", "torch._inductor.compile_fx", "tensorboard")}
found |= {"while importing": gc.get_threshold()[0], "compiles": compiler.compile() is torch.compile}

@exit_with_status
def main():
    found.update(restored=gc.get_threshold() == default, frozen=gc.get_freeze_count())
    print(json.dumps(found))

main()
"""


def run(program, **options):
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr  # as it would where what is frozen is not freed
    return json.loads(done.stdout)


@pytest.mark.integration
def test_what_only_reads_files_imports_no_torch():
    found = run(LIGHT)
    assert not found["torch"]
    assert found["modules"] < 500


@pytest.mark.integration
def test_a_rank_imports_no_compiler_and_collects_no_garbage_meanwhile():
    # unimo3 before torchvision is all that makes it importable next to a CPU build of torch.
    found = run(RANK.replace("torchvision_first", "unimo3, torchvision"))
    assert not any(found[name] for name in ("networkx", "torch._inductor.compile_fx", "tensorboard"))
    assert found["while importing"] > 100 * 700
    assert found["restored"]
    assert found["frozen"] > 100_000
    assert found["compiles"]  # torch's compiler is still DeepSpeed's for whoever asks later
