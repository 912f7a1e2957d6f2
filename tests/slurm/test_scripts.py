"""The job scripts as texts."""

import os
import shutil
import subprocess

import pytest

from tests.spawn import ROOT


@pytest.mark.integration
def test_all_scripts_pass_shellcheck():
    scripts = sorted(str(path) for path in (ROOT / "slurm").glob("*.sbatch"))
    if shutil.which("shellcheck") is None and not os.environ.get("REQUIRE_SLURM"):
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", "-x", *scripts, "slurm/common.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_scripts_begin_their_work_alike():
    # Slurm runs a copy in a folder of its own: until the original is found there is nothing to share.
    scripts = [path.read_text() for path in (ROOT / "slurm").glob("*.sbatch")]
    heads = [script.split("\n# Slurm runs a copy")[1].split("\nfi\n")[0] for script in scripts]
    assert len(heads) == 4
    assert len(set(heads)) == 1


def setup_prints(common, words, **environment):
    """What a script prints after `setup`, where Slurm's answers do not matter."""
    stubs = "with_retries() { echo NodeAddr=n1; }; requested_ranks() { echo 1; }"
    stubs += '; apply_default_policy() { echo "$*"; trap - EXIT; exit; }'
    needed = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "n1"}
    environment = os.environ | needed | {"SLURMD_NODENAME": "n1", "PYTHONPATH": "", "UNIMO3_SITE": ""} | environment
    program = f'source {common}; {stubs}; setup; echo "{words}"; trap - EXIT'
    done = subprocess.run(["bash", "-c", program], cwd=common.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.integration
def test_an_installed_script_uses_the_environment_it_is_in(tmp_path):
    installed = tmp_path / "lib" / "python3.11" / "site-packages" / "slurm"
    installed.mkdir(parents=True)
    shutil.copy(ROOT / "slurm" / "common.sh", installed)
    words = "${PYTHON[*]} $PYTHONPATH"
    assert setup_prints(installed / "common.sh", words) == f"{tmp_path}/bin/python"
    assert setup_prints(ROOT / "slurm" / "common.sh", words) == f"{ROOT}/.venv/bin/python {ROOT}"
    assert setup_prints(installed / "common.sh", words, UNIMO3_PYTHON="/apps/python") == "/apps/python"


@pytest.mark.integration
def test_a_folder_named_as_before_holds_the_job():
    held = setup_prints(ROOT / "slurm" / "common.sh", "", UNIMO3_ROOT=str(ROOT))
    assert held.startswith("78 UNIMO3_ROOT is no longer supported")
