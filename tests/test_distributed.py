import os
import signal

import pytest

from tests.spawn import run_ranks
from unimo3 import distributed
from unimo3.errors import ConfigError


def describe_world() -> dict:
    rank, size = distributed.world()
    distributed.barrier()
    return {
        "world": (rank, size),
        "environment": distributed.world_size_from_environment(),
        "gathered": distributed.all_gather_object({"rank": rank}),
        "broadcast": distributed.broadcast_object(f"from {rank}"),
        "accelerator": os.environ["DS_ACCELERATOR"],
        "again": distributed.init(),
    }


def fail_on_rank_0() -> None:
    if distributed.world()[0] == 0:
        raise ValueError("planted")
    signal.pause()


@pytest.mark.integration
def test_ranks_know_their_number_and_exchange_objects():
    printed = run_ranks(2, describe_world)
    for rank, one in enumerate(printed):
        assert one["world"] == (rank, 2)
        assert one["environment"] == 2
        assert one["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert one["broadcast"] == "from 0"
        assert one["accelerator"] == "cpu"
        assert one["again"] == distributed.World(rank, rank, 2)


def test_a_process_alone_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.world() == (0, 1)
    assert distributed.world_size_from_environment() == 1
    assert distributed.all_gather_object("mine") == ["mine"]
    assert distributed.broadcast_object("mine") == "mine"
    distributed.barrier()


def test_ranks_without_a_rendezvous_address_get_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT: not in the environment, though WORLD_SIZE is 2"):
        distributed.init()


@pytest.mark.integration
def test_the_launcher_ends_the_others_when_a_rank_fails():
    with pytest.raises(AssertionError, match="planted"):
        run_ranks(2, fail_on_rank_0)  # the other rank ends by a signal alone
