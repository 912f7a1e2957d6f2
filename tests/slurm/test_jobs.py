"""Jobs on a real Slurm: from sbatch to a finished run, and every way to be interrupted on the way."""

import pytest

pytestmark = pytest.mark.integration


def test_a_two_node_job_trains_to_its_end(jobs):
    job = jobs.submit("two_nodes", options=("--nodes=2",))
    jobs.wait_state(job, "COMPLETED")
    assert len(jobs.steps("two_nodes")) == 12
