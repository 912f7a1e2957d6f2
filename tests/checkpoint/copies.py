"""Small runs for the tests of copies in an object store, committed as a save commits them."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from pretrain import checkpoints as program
from tests.s3 import URL
from tests.waiting import wait_for
from unimo3.checkpoint import store
from unimo3.checkpoint.manifest import flush_and_hash
from unimo3.checkpoint.save import _commit
from unimo3.checkpoint.state import TrainState
from unimo3.checkpoint.stored_run import StoredRun
from unimo3.training.heartbeat import HEARTBEATS, write_heartbeat

RUN_URL = f"{URL}/runs/small"
CHECKPOINTS = "runs/small/checkpoints"
FILES = ("offloaded/part.bin", "rank_0.bin", "rank_1.bin", store.STATE)
NUM_STEPS = 60


def commit(run: Path, step: int, seed: int = 0) -> Path:
    """A checkpoint of `FILES`, committed as by a save."""
    final = store.folder_of(run) / store.tag_of(step)
    staging = final.with_name(f"{final.name}.tmp")
    (staging / "offloaded").mkdir(parents=True)
    generator = np.random.default_rng([seed, step])
    for name in FILES[:-1]:
        (staging / name).write_bytes(generator.bytes(20_000))
    settings = {"checkpoint.keep_last": 2, "checkpoint.keep_every": 30}
    TrainState(step, 8 * step, "config", "index", 2, 8, {"settings": settings}).write(staging / store.STATE)
    _commit(staging, final, [flush_and_hash(staging, [staging / name for name in FILES])])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
    return final


def make_run(run: Path, *steps: int) -> Path:
    """A run with checkpoints, and the files next to them."""
    (run / "model").mkdir(parents=True)
    (run / "ledger").mkdir()
    (run / "tensorboard").mkdir()
    settings = {"training": {"steps": NUM_STEPS}, "checkpoint": {"keep_last": 3, "keep_every": 0}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "model" / "config.json").write_text('{"model_type": "odd"}')
    (run / "ledger" / "rank_00000.jsonl").write_text('{"step": 1, "samples": []}\n')
    (run / "tensorboard" / "events").write_text("large")
    for step in steps:
        commit(run, step)
    return run


def contents(run: Path) -> dict[str, bytes]:
    """The files of a run that are copied, by name."""
    files = {path.relative_to(run).as_posix(): path for path in run.rglob("*") if path.is_file()}
    names = [
        name for name in files if not name.startswith(("tensorboard", "push_", "heartbeats", "checkpoints/latest"))
    ]
    return {name: files[name].read_bytes() for name in names}


def checkpoint_of(run: Path, step: int) -> dict[str, bytes]:
    return {
        name: content
        for name, content in contents(run).items()
        if name.startswith(f"checkpoints/{store.tag_of(step)}/")
    }


def stored(s3, run_url: str = RUN_URL) -> dict[str, bytes]:
    """The objects of a run by name."""
    remote = StoredRun(run_url)
    start = run_url.removeprefix(f"{URL}/")
    return {name: s3.call("GET", f"{start}/{name}") for name in remote.objects}


def complete_and_good(run_url: str = RUN_URL) -> list[str]:
    """The checkpoints that readers see, each of which has to be good."""
    remote = StoredRun(run_url)
    for tag in remote.tags():
        assert remote.verify(tag) == []
    return remote.tags()


def keys(s3, method: str) -> list[str]:
    """Keys of the requests of a method in the order in which they came, without the run's prefix."""
    requests = [request.key for request in s3.requests if request.method == method]
    return [key.removeprefix("runs/small/") for key in requests]


def run_program(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        program.main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def write_heartbeat_of(pid: int, run: Path) -> None:
    """As a rank with this process id writes it."""
    (run / HEARTBEATS).mkdir(exist_ok=True)
    write_heartbeat(run, 0, 3, "step", 1, 0.0)
    path = run / HEARTBEATS / "rank_00000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": pid}))


def kill(pid: int) -> None:
    """End a process with SIGKILL; it has ended when this returns, and another thread learns of its status."""
    os.kill(pid, signal.SIGKILL)

    def has_ended() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_for(has_ended, "the kill")


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(folder: Path) -> None:
    """As retention removes a checkpoint."""
    renamed = folder.rename(folder.with_name(f"{folder.name}.old.tmp"))
    shutil.rmtree(renamed)
