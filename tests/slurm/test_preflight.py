"""What the checks before a start conclude: from pairs of nodes, and from the room a run needs. Without a Slurm."""

import json

import pytest

from slurm import preflight
from slurm.network import rounds_of, slow_nodes
from unimo3 import limits


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 7, 8])
def test_every_node_is_timed_with_both_neighbours_one_pair_at_a_time(num_nodes):
    rounds = rounds_of(num_nodes)
    pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
    ring = {frozenset((node, (node + 1) % num_nodes)) for node in range(num_nodes)}
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == ring
    assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in rounds)


def ring(*rates):
    """Pairs of a ring of nodes a, b, c...: the rate of each with the next."""
    names = "abcdefgh"[: len(rates)]
    return {(names[index], names[(index + 1) % len(rates)]): rate for index, rate in enumerate(rates)}


def test_the_node_that_is_slow_with_both_neighbours_is_named():
    slow = slow_nodes(ring(9.0, 1.0, 2.0, 9.0), 5.0)
    assert slow == {"c": "an all-reduce runs at 1.00 GB/s with b and 2.00 GB/s with d, below MIN_ALLREDUCE_GBPS 5"}


def test_no_node_is_named_where_one_cable_or_all_of_the_network_is_slow():
    assert slow_nodes(ring(9.0, 1.0, 9.0, 9.0), 5.0) == {}
    assert slow_nodes(ring(1.0, 1.0, 1.0), 5.0) == {}
    assert slow_nodes({("a", "b"): 1.0}, 5.0) == {}


@pytest.mark.parametrize(
    ("num_nodes", "master", "address", "interface", "problem"),
    [
        (2, "10.0.0.1", "127.0.1.1", "", "resolves to 127.0.1.1, which other nodes cannot reach"),
        (2, "node1", "127.0.0.1", "", "export GLOO_SOCKET_IFNAME=INTERFACE"),
        (1, "node1", "127.0.1.1", "", ""),
        (2, "10.0.0.1", "127.0.1.1", "eth0", ""),
        (2, "10.0.0.1", "10.0.0.2", "", ""),
        (2, "127.0.0.1", "127.0.1.1", "", ""),
    ],
)
def test_a_node_whose_name_resolves_to_itself_is_named(monkeypatch, num_nodes, master, address, interface, problem):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(num_nodes))
    monkeypatch.setenv("MASTER_ADDR", master)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    monkeypatch.setattr(preflight.socket, "gethostbyname", lambda _: address)
    problems = preflight.address_problems()
    assert problem in "; ".join(problems)
    assert bool(problems) == bool(problem)


def test_disk_space_covers_retained_saves_and_the_one_being_written(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_MIN_FREE_BYTES", 1)
    monkeypatch.setattr(preflight, "_MIN_FREE_INODES", 1)
    usage = preflight.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)  # others write to the disk meanwhile
    free = usage.free
    (tmp_path / "config.yaml").write_text("checkpoint: {keep_last: 4}\n")
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").write_text(json.dumps({"files": [{"bytes": free // 2 - 10**7}]}))
    assert preflight.job_problems(tmp_path, 0) == [  # three more of half of what is free
        f"{tmp_path}: {free / 1e9:.2f} GB are free, {3 * (free // 2 - 10**7) / 1e9:.2f} are needed"
    ]
    (tmp_path / "config.yaml").write_text("checkpoint: {keep_last: 1}\n")
    assert preflight.job_problems(tmp_path, 0) == []


def test_limits_of_the_shell_are_the_jobs_and_shared_memory_is_the_nodes(tmp_path, monkeypatch):
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (48, 48))
    monkeypatch.setattr(limits, "SHARED_MEMORY", str(tmp_path / "missing"))
    assert any("ulimit -n: 48 open files" in problem for problem in preflight.job_problems(tmp_path, 0))
    problems = preflight.node_problems(tmp_path, 0, tmp_path)
    assert not any("ulimit" in problem for problem in problems)
    assert any("missing: cannot be used (No such file" in problem for problem in problems)
