import os
import signal
from pathlib import Path

import psutil
import pytest

from tests import fake_gpus
from tests.spawn import SERVER, run_alone, run_ranks
from tests.waiting import wait_for, wait_for_end
from unimo3 import distributed
from unimo3.errors import CheckpointError, ConfigError
from unimo3.launch import free_port
from unimo3.training.process import start_process
from unimo3.training.run import RunArgs


def describe_world() -> dict:
    rank, size = distributed.world()
    distributed.barrier()
    return {
        "world": (rank, size),
        "environment": distributed.world_size_from_environment(),
        "gathered": distributed.all_gather_object({"rank": rank}),
        "broadcast": distributed.broadcast_object(f"from {rank}"),
        "read_once": distributed.from_first_rank("reading", lambda: f"read by {rank}", "fix it"),
        "failed_once": error_of_first_rank(rank),
        "accelerator": os.environ["DS_ACCELERATOR"],
        "again": distributed.init(),
    }


def error_of_first_rank(rank: int) -> str:
    with pytest.raises(CheckpointError) as error:
        distributed.from_first_rank("reading FILE", lambda: {}[f"on rank {rank}"], "restore it")
    return str(error.value)


def fail_on_rank_0() -> None:
    if distributed.world()[0] == 0:
        raise ValueError("planted")
    signal.pause()


def join_with(environment: dict[str, str], folder: Path) -> distributed.World:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as at the start of a program
    return start_process(RunArgs("run", str(folder)), stall_after_s=0).world


@pytest.mark.integration
def test_ranks_know_their_number_and_exchange_objects():
    printed = run_ranks(2, describe_world)
    for rank, one in enumerate(printed):
        assert one["world"] == (rank, 2)
        assert one["environment"] == 2
        assert one["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert one["broadcast"] == "from 0"
        assert one["read_once"] == "read by 0"
        assert one["failed_once"] == "reading FILE failed (rank 0: KeyError: 'on rank 0'); restore it"
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
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    expected = "LOCAL_RANK, MASTER_ADDR, MASTER_PORT: not in the environment, though WORLD_SIZE is 2"
    with pytest.raises(ConfigError, match=expected):
        distributed.init()


@pytest.mark.integration
def test_the_launcher_ends_the_others_when_a_rank_fails():
    with pytest.raises(AssertionError, match="planted"):
        run_ranks(2, fail_on_rank_0)  # the other rank ends by a signal alone


def take_gpu(visible: list[str]) -> str:
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[distributed.world()[0]]
    fake_gpus.install()
    try:
        seen = distributed.choose_gpu()
    except ConfigError as error:
        return str(error)
    assert seen.endswith(f"takes number {os.environ['LOCAL_RANK']}")  # which DeepSpeed takes, too
    return visible[distributed.world()[0]].split(",")[int(os.environ["LOCAL_RANK"])]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("visible", "taken"),
    [
        (["0,1", "0,1"], ["0", "1"]),
        (["0", "1"], ["0", "1"]),  # --gpu-bind=single:1, --gpus-per-task=1
        (["1", "0"], ["1", "0"]),
        (["0,1", "2,3"], ["0", "3"]),
    ],
)
def test_each_rank_has_a_gpu_of_its_own_whatever_it_sees(visible, taken):
    assert run_ranks(len(visible), take_gpu, visible) == taken


@pytest.mark.integration
@pytest.mark.parametrize("visible", [["0,1"] * 3, ["1", "1"]])
def test_ranks_that_would_share_a_gpu_are_refused_on_every_rank(visible):
    (error,) = set(run_ranks(len(visible), take_gpu, visible))
    assert f"CUDA_VISIBLE_DEVICES: '{visible[0]}': rank " in error
    assert "would share a GPU with another: local rank " in error
    assert f"sees {len(visible[0].split(','))} GPUs" in error
    assert "request one GPU per rank (--gpus-per-node), or start fewer ranks" in error


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_ranks_that_wait_for_one_that_never_comes(tmp_path, number):
    port = free_port()
    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        SERVER.Process(target=join_with, args=(shared | {"RANK": rank, "LOCAL_RANK": rank}, tmp_path), daemon=True)
        for rank in "01"
    ]
    for rank in ranks:
        rank.start()

    def has_met_rank_0(pid: int) -> bool:
        connections = psutil.Process(pid).net_connections()
        return any(one.raddr and one.raddr.port == port and one.status == "ESTABLISHED" for one in connections)

    wait_for(lambda: all(has_met_rank_0(rank.pid) for rank in ranks), "ranks that wait for the third")
    for rank in ranks:
        os.kill(rank.pid, number)
        wait_for_end(rank, "a rank that waits")
        assert rank.exitcode == -number


@pytest.mark.integration
def test_a_process_alone_waits_for_no_launcher_that_is_gone(tmp_path):
    left_behind = {"WORLD_SIZE": "1", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1", "RANK": "3", "LOCAL_RANK": "1"}
    left_behind |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    assert run_alone(join_with, left_behind, tmp_path) == distributed.World(0, 0, 1)
