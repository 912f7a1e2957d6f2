"""A real Slurm for the tests here, and jobs of the project's own scripts on it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.data.conftest import coco, source, vqav2  # noqa: F401  (fixtures)
from tests.finetune.conftest import pretrained, tokenizer  # noqa: F401  (fixtures)
from tests.integration.conftest import recipe, runs  # noqa: F401  (fixtures)
from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.fork_server import serve
from tests.slurm.jobs import Jobs
from tests.spawn import start_process
from tests.waiting import wait_for

pytest.register_assert_rewrite("tests.slurm.compare")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes of two cores each, all on this host."""
    if missing := missing_programs():
        text = f"needs Slurm: {', '.join(missing)} not found; Debian has them in slurm-wlm and munge"
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(text)
        pytest.skip(text)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of `tests.slurm.fork_server`."""
    address = tmp_path_factory.mktemp("server") / "socket"
    server = start_process(serve, address)
    wait_for(address.exists, "the server that ranks are forked from")
    yield address
    server.terminate()
    server.join()


@pytest.fixture(scope="session")
def jobs(
    cluster: Cluster,
    recipe: Path,  # noqa: F811
    fork_server: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Jobs:
    """For jobs of the small recipe with one layer a tower: half the time of a step."""
    values = yaml.safe_load(recipe.read_text())
    model = values["model"]
    model["num_hidden_layers"] = model["text"]["num_hidden_layers"] = model["vision"]["depth"] = 1
    small = recipe.with_name("slurm.yaml")
    small.write_text(yaml.safe_dump(values))
    return Jobs(cluster, small, tmp_path_factory.mktemp("jobs"), fork_server)


@pytest.fixture(scope="session")
def straight(jobs: Jobs) -> Path:
    """A run of `NUM_STEPS` steps on two nodes that nothing disturbed."""
    job = jobs.submit("straight", "--data.ledger", "true", options=("--nodes=2",), PREFLIGHT="yes")
    jobs.wait_state(job, "COMPLETED")
    return jobs.runs / "straight"


@pytest.fixture
def site(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """As a user on the cluster's login node."""
    for name, value in (jobs.environment | jobs.cluster.environment).items():
        monkeypatch.setenv(name, value)
    return jobs
