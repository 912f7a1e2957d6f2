"""The job scripts as texts."""

import os
import shutil
import subprocess

import pytest

from tests.integration.conftest import ROOT


def test_all_scripts_pass_shellcheck():
    scripts = sorted(str(path) for path in (ROOT / "slurm").glob("*.sbatch"))
    if shutil.which("shellcheck") is None and not os.environ.get("REQUIRE_SLURM"):
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", "-x", *scripts, "slurm/common.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
