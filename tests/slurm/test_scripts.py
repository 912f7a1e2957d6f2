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
    # Slurm runs a copy in a folder of its own: until the project's is found there is nothing to share.
    heads = [path.read_text().split("\nif ! cd ")[1].split("\nfi\n")[0] for path in (ROOT / "slurm").glob("*.sbatch")]
    assert len(heads) == 4
    assert len(set(heads)) == 1
