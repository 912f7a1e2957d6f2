"""Nodes that a job leaves out, and takes back when the ledger's entries expire."""

import pytest

from slurm import history
from slurm.bad_nodes import choose


@pytest.mark.parametrize(
    ("excluded", "ours", "bad", "nodes", "added"),
    [
        ([], [], ["n1"], ["n1"], ["n1"]),
        (["n1"], ["n1"], [], [], []),  # expired
        (["n1", "n2"], ["n1"], [], ["n2"], []),  # n2 is the user's
        (["n1", "n2"], ["n1"], ["n3"], ["n2", "n3"], ["n3"]),
        (["n1"], [], ["n1"], ["n1"], []),  # the user's stays the user's, in the ledger or not
        (["n1"], [], [], ["n1"], []),
    ],
)
def test_expired_nodes_are_included_again_and_the_users_stay_excluded(excluded, ours, bad, nodes, added):
    assert choose(excluded, ours, bad) == (nodes, added)


def test_a_jobs_last_change_counts_and_an_arrays_applies_to_its_links(tmp_path):
    assert history.excluded(tmp_path, "7") == []
    for job, nodes in (("7", ["n1"]), ("8", ["n9"]), ("7_2", ["n1", "n2"])):
        history.append(tmp_path, "exclude", job=job, nodes=nodes)
    assert history.excluded(tmp_path, "7_1") == ["n1"]
    assert history.excluded(tmp_path, "7_2") == ["n1", "n2"]
    assert history.excluded(tmp_path, "8") == ["n9"]
    assert history.read(tmp_path) == []  # no starts
