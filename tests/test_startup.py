"""What starting a program costs: modules that it does not need stay out of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.spawn import ROOT

# What each program imports until its help, its version, an error of its settings or a list of checkpoints is printed.
COMMANDS = (
    *(
        f"pretrain.{name} --help"
        for name in ("train", "prepare_shards", "export", "checkpoints", "plan", "toy", "demo", "log_to")
    ),
    *(f"finetune.{name} --help" for name in ("choose", "nlvr2", "retrieval", "snli_ve", "vqa", "predict", "plan")),
    *(f"{name} --help" for name in ("finetune.__main__", "unimo3.launch", "slurm.submit", "slurm.status")),
    "finetune.predict vqa --help",
    "pretrain.train --version",
    "pretrain.train --config pretrain/recipes/base.yaml --print_config",
    "pretrain.train --config pretrain/recipes/base.yaml --optim.lr 0 --model.hiden_size 1",
    "finetune.vqa --config finetune/recipes/vqa_base.yaml",
    "pretrain.checkpoints ls RUN",
    "slurm.status RUN",
    "slurm.submit --dry-run prepare_shards coco --src pretrain --out new",
    "slurm.preflight node --run RUN --results RUN",
)
LIGHT = """
import contextlib, importlib, io, json, sys
import slurm.requeue_policy, slurm.runs
imported = {}
for command in sys.argv[1:]:
    program, *words = command.split()
    sys.argv = ["-m", *words]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        importlib.import_module(program).main()
    heavy = [name for name in ("torch", "transformers", "deepspeed", "timm", "fsspec", "s3fs") if name in sys.modules]
    imported[command] = [heavy, len(sys.modules), len(output.getvalue())]
print(json.dumps(imported))
"""
RANK = """
import collections, gc, json, sys
default = gc.get_threshold()
opened = collections.Counter()

def count(event, arguments):
    if event == "open" and "/transformers/models/" in str(arguments[0]) and str(arguments[1]).startswith("r"):
        opened[arguments[0]] += str(arguments[0]).endswith(".py") and arguments[1] == "r"

sys.addaudithook(count)
import torchvision_first
import pretrain.program
from unimo3.errors import exit_with_status
from unimo3.training.engine import import_muon_uncompiled
import_muon_uncompiled()
from deepspeed.runtime import compiler
import torch
unwanted = ("networkx", "torch._inductor.compile_fx", "tensorboard", "wandb", "mlflow", "botocore", "pyarrow")
facts = {"unwanted": [name for name in unwanted if name in sys.modules]}
facts |= {"files of transformers": len(opened), "read twice": sum(number > 1 for number in opened.values())}
facts |= {"while importing": gc.get_threshold()[0], "compiles": compiler.compile() is torch.compile}

@exit_with_status
def main():
    facts.update(restored=gc.get_threshold() == default, frozen=gc.get_freeze_count())
    print(json.dumps(facts))

main()
"""


def run(program, *words, **options):
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr  # as without freeing the frozen objects
    return json.loads(done.stdout)


@pytest.mark.integration
def test_helps_errors_and_lists_import_no_torch(tmp_path):
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("training: {steps: 1}\n")
    imported = run(LIGHT, *(command.replace("RUN", str(tmp_path)) for command in COMMANDS))
    for command, (heavy, num_modules, length) in imported.items():
        assert not heavy, command
        assert num_modules < 600, command
        # Errors are on the other stream, and a good node prints nothing.
        assert length or any(words in command for words in ("lr 0", "vqa_base", "preflight"))


@pytest.mark.integration
def test_a_rank_imports_no_compiler_and_reads_no_file_twice():
    # unimo3 before torchvision is all that makes it importable next to a CPU build of torch.
    facts = run(RANK.replace("torchvision_first", "unimo3, torchvision"))
    assert facts["unwanted"] == []
    assert facts["while importing"] > 100 * 700
    assert facts["restored"]
    assert facts["frozen"] > 100_000
    assert facts["files of transformers"] > 1000
    assert facts["read twice"] < 50  # some by others, such as for their source
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
    assert done.stdout.decode() == "\nanswer: 走行/é\n", done.stderr
